"""What a session leaves: its outcome and its results, read from files or from an executed notebook, and checked."""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from ..errors import ResultError
from ..files import parse_json, sha256, write_json
from .job import JOBS
from .ledger import Entry
from .setup_cell import OUTCOME, SCHEMA

ENDED_EARLY = "the session ended before its notebook did: killed, out of memory, or out of time"


class Outcome(BaseModel):
    """eaft_run.json: how one session ended. ``files`` maps each result file to its SHA-256."""

    schema_: Annotated[Literal[SCHEMA], Field(alias="schema")]
    run: str
    attempt: int
    params_sha256: str
    code_sha256: str
    commit: str
    status: Literal["running", "complete", "failed", "deadline"]
    error: str | None
    machine: dict[str, Any]
    files: dict[str, str]


def read(folder: Path) -> Outcome:
    """Raises ResultError when the file is missing, is another kind of file (a 404 page, say), or has another shape."""
    path = folder / OUTCOME
    return _outcome(parse_json(path, ResultError, "the session left no outcome"), path)


def require_own(outcome: Outcome, entry: Entry) -> None:
    """Raise ResultError unless it is of this run's present attempt."""
    for name in ("run", "params_sha256", "code_sha256"):
        found, expected = getattr(outcome, name), getattr(entry, name)
        if found != expected:
            raise ResultError(f"{OUTCOME}: {name} is {found}, expected {expected}: this is another run's output")
    if outcome.attempt != entry.attempt:
        raise ResultError(f"this is the output of attempt {outcome.attempt}, expected {entry.attempt}")


def check(folder: Path, outcome: Outcome, entry: Entry) -> None:
    """Raise ResultError unless ``folder`` holds the complete and sound results of this run and no other."""
    require_own(outcome, entry)
    if outcome.status == "running":
        raise ResultError(ENDED_EARLY)
    if outcome.status != "complete":
        raise ResultError(last_line(outcome.error or "failed without an error"))
    for name, digest in outcome.files.items():
        if not (folder / name).is_file():
            raise ResultError(f"{name} did not come back, although the session wrote it")
        if sha256(folder / name) != digest:
            raise ResultError(f"{name} is not the file that the session wrote: its SHA-256 differs")
    job = JOBS[entry.notebook]
    wanted = job.files(entry.params)
    if missing := sorted(set(wanted) - set(outcome.files)):
        raise ResultError(f"the session wrote {sorted(outcome.files)}; {missing} are missing")
    for file in (folder / name for name in wanted if name.endswith(".json")):
        _require_finite(file)
        job.verify(file, entry)


def from_notebook(notebook: Path, out_dir: Path | None = None) -> tuple[Outcome, list[Path]]:
    """Write the result JSONs that an executed notebook carries to ``out_dir``; returns the outcome and their paths.

    Without ``out_dir`` they go into a folder beside the notebook, named after the run. The same bytes that the session
    wrote: each file's SHA-256 is checked. Raises ResultError, and writes nothing, when there is no marked output, it is
    damaged, or a file of other content would be replaced.
    """
    content = parse_json(notebook, ResultError, "give an executed notebook")
    marked = list(_marked_outputs(content))
    if not marked:
        raise ResultError(
            f"{notebook} has no output marked {SCHEMA!r}: it was not executed, lost its outputs, or is no run's notebook"
        )
    outcome = _outcome(marked[-1], notebook)
    _require_file_name(outcome.run, notebook)
    out_dir = out_dir or notebook.parent / outcome.run
    found = {out_dir / name: result for name, result in _carried_results(marked[-1], outcome, notebook)}
    for path in found:
        if path.exists() and sha256(path) != outcome.files[path.name]:
            raise ResultError(f"{path} is there with other content; move it away, or give another --out-dir")
    for path, result in found.items():
        write_json(path, result)
    return outcome, list(found)


def _carried_results(marked: dict, outcome: Outcome, notebook: Path) -> Iterator[tuple[str, dict]]:
    """Names and contents of a marked output's results, whose text is the file's but for its white space."""
    results_by_name = marked.get("results")
    if not isinstance(results_by_name, dict):
        raise ResultError(f"{notebook}: its output marked {SCHEMA!r} holds no results")
    for name, text in results_by_name.items():
        _require_file_name(name, notebook)
        if not name.endswith(".json"):
            raise ResultError(f"{notebook}: result name {name!r} is not a JSON file's")
        try:
            result = json.loads(text)
            written = json.dumps(result, indent=1, allow_nan=False) + "\n"
        except (TypeError, ValueError) as cause:
            raise ResultError(f"{notebook}: {name} is not the JSON that a session writes: {cause}") from None
        if hashlib.sha256(written.encode()).hexdigest() != outcome.files.get(name):
            raise ResultError(f"{notebook}: {name} was changed after the session wrote it (its SHA-256 differs)")
        yield name, result


def _require_file_name(name: str, notebook: Path) -> None:
    if Path(name).name != name or name in ("", ".."):
        raise ResultError(f"{notebook}: {name!r} is not a file name")


def last_line(error: str) -> str:
    return error.strip().splitlines()[-1]


def _outcome(content: object, source: Path) -> Outcome:
    try:
        return Outcome.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise ResultError(
            f"{source} is no outcome of a session: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        ) from None


def _require_finite(path: Path) -> None:
    for where, number in _numbers(parse_json(path, ResultError, "pull again")):
        if not math.isfinite(number):
            raise ResultError(f"{path.name}: {where} is {number}")


def _numbers(content: object, where: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _numbers(value, f"{where}.{key}".lstrip("."))
    elif isinstance(content, list):
        for value in content:
            yield from _numbers(value, where)
    elif isinstance(content, float):
        yield where, content


def _marked_outputs(notebook: object) -> Iterator[dict]:
    for cell in _items(notebook, "cells"):
        for output in _items(cell, "outputs"):
            marked = _get(_get(output, "data"), "application/json")
            if _get(marked, "schema") == SCHEMA:
                yield marked


def _items(content: object, name: str) -> list:
    found = _get(content, name)
    return found if isinstance(found, list) else []


def _get(content: object, name: str) -> object:
    return content.get(name) if isinstance(content, dict) else None
