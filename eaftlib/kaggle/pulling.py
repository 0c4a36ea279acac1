"""Bring back what runs left, check it, keep it. Repeated, it goes on where it was stopped."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from ..errors import KaggleError, ResultError
from . import ledger, outcome
from .following import GRACE, Say, arrived, chosen, counts, describe, refresh, say_now
from .ledger import Entry
from .service import Refused, Service
from .sessions import LOG, take_stock

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def pull(service: Service, runs: Sequence[str] = (), say: Say = say_now) -> list[Entry]:
    """Bring back the output of every run that has ended, check it, say what came.

    runs: these, also if they were settled before, say by a download that failed; else all of the account's that were
    not. A run whose results are complete and its own becomes ``verified``, and they are in ``result/``. Any other becomes
    ``unfinished``, where another session can go on, or ``failed``; what came lies in ``left-<attempt>/`` with the log.
    Raises KaggleError at the end if a run could not be asked about.
    """
    pulled, problems = [], []
    for named in chosen(service, runs):
        if not runs and named.state in ("verified", "failed", "unfinished"):
            continue
        try:
            entry = bring(service, named.run)
        except KaggleError as error:
            problems.append(named.run)
            say(f"{named.run}  {error}")
            continue
        pulled.append(entry)
        say(describe(entry))
        if entry.state in ("failed", "unfinished") and (trace := last_traceback(entry)):
            say("    " + trace.replace("\n", "\n    "))
    if problems:
        raise KaggleError(f"not pulled: {', '.join(problems)}. Repeat the command later.")
    if not pulled:
        say(f"nothing to pull: {counts(service) or 'no runs'}")
    return pulled


def bring(service: Service, run: str) -> Entry:
    """How one run is getting on, with its output if its session is over."""
    with ledger.locked():
        entry = ledger.find(run)
        if entry.state in ("failed", "unfinished") or (entry.state == "verified" and not entry.result_folder.is_dir()):
            entry = _look_again(service, entry)
        entry = refresh(service, entry)
    if entry.state != "ended":
        return entry
    with ledger.locked(run):  # only a pull takes a run out of this state, so a download need not hold up the rest
        entry = ledger.find(run)
        return _fetch(service, entry) if entry.state == "ended" else entry


def _look_again(service: Service, entry: Entry) -> Entry:
    """Reopen a run that was settled, if its kernel shows the present attempt."""
    entry.require_owner(service.owner)
    return arrived(service, entry) or entry


def _fetch(service: Service, entry: Entry) -> Entry:
    """Download into a fresh folder, check, and only then give the folder its name."""
    download = ledger.folder(entry.run) / ".download"
    shutil.rmtree(download, ignore_errors=True)
    download.mkdir()
    refused: list[str] = []
    try:
        log, refused = service.output(entry.run, download)
        (download / LOG).write_text(readable_log(log))
        found = outcome.read(download)
        outcome.check(download, found, entry)
        if refused:
            raise ResultError(refused[0])
    except (ResultError, Refused) as error:
        if _shows_attempt_before(download, entry):
            return entry.enter("submitted", f"the service still shows attempt {entry.attempt - 1}")
        reasons = [entry.steps[-1].note, str(error).replace(f"{download}/", ""), *refused]
        if (download / outcome.OUTCOME).is_file() or not entry.left_folder(entry.attempt).is_dir():
            _replace(download, entry.left_folder(entry.attempt))
        return take_stock(entry, reasons)
    _replace(download, entry.result_folder)
    return entry.enter("verified", results=found.files)


def _shows_attempt_before(download: Path, entry: Entry) -> bool:
    """Right after a second push the output may be the first one's, which may have left nothing."""
    if entry.attempt == 1 or entry.age > GRACE:
        return False
    try:
        return outcome.read(download).attempt < entry.attempt
    except ResultError:
        return True


def _replace(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)  # of a process that was killed before it could say so in the ledger
    source.rename(target)


def readable_log(log: str) -> str:
    """The session's log as text: Kaggle sends a JSON list of {stream_name, time, data}."""
    try:
        lines = json.loads(log)
    except json.JSONDecodeError:
        return log
    if not isinstance(lines, list) or not all(isinstance(line, dict) for line in lines):
        return log
    return _ANSI.sub("", "".join(str(line.get("data", "")) for line in lines))


def last_traceback(entry: Entry) -> str:
    """From the outcome, or else from the log; at most its last 30 lines. None of a deadline, which is no error."""
    folder = entry.left_folder(entry.attempt)
    try:
        found = outcome.read(folder)
        if found.status == "deadline":
            return ""
        text = found.error or ""
    except ResultError:  # there is none, which is already the run's note
        text = ""
    if not text and (folder / LOG).is_file():
        text = (folder / LOG).read_text()
    start = text.rfind("Traceback (most recent call last)")
    return "\n".join(text[start:].strip().splitlines()[-30:]) if start >= 0 else ""
