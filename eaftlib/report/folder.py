"""The folder that a report is written to."""

from pathlib import Path

from ..files import json_text, write_together
from . import figures, page, tables
from .model import Report


def write(report: Report, out_dir: str | Path) -> list[Path]:
    """report.html, report.md, results.csv, verdict.json and figures/; all of them or, where one fails, none. Returns paths."""
    contents: dict[str, bytes] = {
        "report.html": page.html(report).encode(),
        "report.md": tables.markdown(report).encode(),
        "results.csv": tables.csv(report).encode(),
        "verdict.json": json_text(report.content()).encode(),
    }
    for name, picture in _pictures(report).items():
        contents[f"figures/{name}.png"] = picture.png()
        contents[f"figures/{name}.svg"] = picture.svg().encode()
    return write_together(Path(out_dir), contents)


def _pictures(report: Report) -> dict[str, figures.Picture]:
    """By file name: the keep curve, and the baseline's landscapes by sequence length."""
    found = {"keep_curve": figures.keep_curve(report.curve)} if report.curve else {}
    return found | {
        f"landscape-{part.seq_len}": figures.landscape(part.model, part.title) for part in report.landscapes
    }
