"""The folder that a report is written to."""

from pathlib import Path

from ..files import write_atomically, write_json
from . import page, tables
from .model import Report


def write(report: Report, out_dir: str | Path) -> list[Path]:
    """report.html, report.md, results.csv and verdict.json; returns their paths."""
    out_dir = Path(out_dir)
    texts = {"report.html": page.html(report), "report.md": tables.markdown(report), "results.csv": tables.csv(report)}
    for name, text in texts.items():
        write_atomically(out_dir / name, lambda temporary, text=text: Path(temporary).write_text(text))
    write_json(out_dir / "verdict.json", report.content())
    return [out_dir / name for name in (*texts, "verdict.json")]
