"""Paired notebooks: the percent script is the source, the .ipynb beside it is generated from it, without outputs."""

import ast
from pathlib import Path
from typing import Any

FOLDER = Path("notebooks")


def path(name: str) -> Path:
    """The .ipynb of a notebook, by its name."""
    return FOLDER / f"{name}.ipynb"


def defaults(name: str) -> dict[str, Any]:
    """Names and values of a notebook's cell that is tagged as parameters."""
    import nbformat

    cells = nbformat.read(path(name), nbformat.NO_CONVERT).cells
    source = next(c.source for c in cells if "parameters" in c.metadata.get("tags", []))
    return {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(source).body}


def generated(source: Path) -> str:
    """The .ipynb text of a percent script; cell ids are counted, so that the same source gives the same bytes."""
    import jupytext

    notebook = jupytext.read(source)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02}"
    return jupytext.writes(notebook, fmt="ipynb") + "\n"


def stale(folder: Path = FOLDER) -> list[Path]:
    """Sources whose .ipynb is missing or differs from what they generate."""
    pairs = [(source, source.with_suffix(".ipynb")) for source in sorted(folder.glob("*.py"))]
    return [s for s, notebook in pairs if not notebook.is_file() or notebook.read_text() != generated(s)]


def regenerate(folder: Path = FOLDER) -> list[Path]:
    """Write the .ipynb of every stale source; returns the sources."""
    sources = stale(folder)
    for source in sources:
        source.with_suffix(".ipynb").write_text(generated(source))
    return sources
