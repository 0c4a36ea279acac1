"""A run that is longer than a session: what one session left, and the next that goes on from it."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from ..errors import ResultError
from ..files import sha256
from . import build, ledger, outcome
from .build import Settings
from .following import GRACE, Say
from .job import JOBS
from .ledger import Entry, Session
from .service import Service

JOURNAL = "journal"  # engine.journal.FOLDER, which cannot be imported without torch
LOG = "session.log"
CARRY_LIMIT = 4_000_000_000  # bytes that go up again: an hour at 10 Mbit/s
_ALIVE = ("QUEUED", "RUNNING")


@dataclass(frozen=True)
class Left:
    """What lies in ``folder`` that another session can go on from. too_large: bytes of what is not carried, or 0."""

    folder: Path
    files: list[Path]
    finished: int
    journal_bytes: int
    too_large: int

    def __str__(self) -> str:
        whole = [f.name for f in self.files if f.parent == self.folder]
        noted = len(self.files) - len(whole)
        return ", ".join([*whole, *([f"{JOURNAL} ({noted} files, {_mb(self.journal_bytes)})"] if noted else [])])


def look(folder: Path, notebook: str) -> Left:
    """What a session of this notebook left; of what is too large together, the finished part goes first."""
    partial, finished = JOBS[notebook].partial(folder)
    journal = sorted(f for f in (folder / JOURNAL).rglob("*") if f.is_file() and not f.name.startswith("."))
    too_large = 0
    if _size(partial) + _size(journal) > CARRY_LIMIT:
        too_large, journal = too_large + _size(journal), []
    if _size(partial) > CARRY_LIMIT:
        too_large, partial, finished = too_large + _size(partial), [], 0
    return Left(folder, [*partial, *journal], finished, _size(journal), too_large)


def take_stock(entry: Entry, reasons: Sequence[str]) -> Entry:
    """An attempt is over without results, and what came lies in its folder: ``unfinished`` if another session helps.

    It does not where the notebook raised an error, a person ended the session, what is there is too large to go along, or
    two sessions in a row made no progress. reasons: why there are no results.
    """
    folder = entry.left_folder(entry.attempt)
    left, cut_off = look(folder, entry.notebook), _was_cut_off(folder, entry)
    session, before = _session(entry, left, _status(folder, entry)), entry.session_before
    reasons = [*reasons]
    if left.too_large:
        reasons.append(
            f"what it left has {_mb(left.too_large)}; at most {_mb(CARRY_LIMIT)} go along to another session"
        )
    stuck = before is not None and not before.progress and not session.progress
    if cut_off and stuck:
        reasons.append(
            f"no progress in two sessions in a row, {before.attempt} and {session.attempt}: give it more time (session_hours, "
            "another accelerator) or less to do"
        )
    goes_on = cut_off and not stuck and not left.too_large
    unit = JOBS[entry.notebook].unit
    stock = f"session {session.attempt} left {session.finished} {unit} and {_mb(session.journal_bytes)} of a journal"
    note = " | ".join(dict.fromkeys([*([stock] if cut_off else []), *reasons]))
    sessions = [*(s for s in entry.sessions if s.attempt != entry.attempt), session]
    return entry.enter("unfinished" if goes_on else "failed", note, sessions=sessions)


def go_on(service: Service, run: str, settings: Settings, say: Say) -> Entry:
    """Queue another attempt of a run that is unfinished, or has failed, with what it has; not while its session goes on."""
    with ledger.locked(run):
        entry = ledger.find(run)
        if entry.state not in ("unfinished", "failed"):
            return entry
        if _may_be_alive(service, entry):
            say(f"{run}  its session is still going on: stop it at {entry.url}, or pull its results when it has ended")
            return entry
        changes = {"attempt": entry.attempt + 1, "version": None, "url": None}
        changes["session_seconds"] = build.session_seconds(settings)
        left = _to_go_on_from(entry)
        _build(entry, entry.model_copy(update=changes), settings, left)
        note = f"resumes with {left}" if left and left.files else "starts again: nothing was finished"
        with ledger.locked():
            now = ledger.find(run)
            return now.enter("queued", note, **changes) if now.state == entry.state else now


def has_partial(entry: Entry) -> bool:
    left = _to_go_on_from(entry)
    return bool(left and left.files)


def _build(entry: Entry, following: Entry, settings: Settings, left: Left | None) -> None:
    """The push folder of the attempt that follows: whole, or not there."""
    target = following.push_folder
    temporary = target.with_name(f".{target.name}")
    for leftover in (target, temporary):  # of a process that was killed here
        shutil.rmtree(leftover, ignore_errors=True)
    files = left.files if left else []
    carried = [build.Carried(f.relative_to(left.folder).as_posix(), f, sha256(f), resume=True) for f in files]
    build.build_next(following, entry.push_folder, temporary, settings, carried)
    temporary.rename(target)


def _session(entry: Entry, left: Left, status: str | None) -> Session:
    before = entry.session_before
    from_before = before and before.next_from
    began = next(((s.finished, s.journal_bytes) for s in entry.sessions if s.attempt == from_before), (0, 0))
    progress = (left.finished, left.journal_bytes) > began
    # One that was killed may have lost part of what it began with; one that came to its deadline knew what it set aside.
    own = bool(left.files) and (progress or status == "deadline")
    return Session(
        attempt=entry.attempt,
        finished=left.finished,
        journal_bytes=left.journal_bytes,
        progress=progress,
        next_from=entry.attempt if own else from_before,
    )


def _to_go_on_from(entry: Entry) -> Left | None:
    attempt = entry.sessions[-1].next_from if entry.sessions else None
    return attempt and look(entry.left_folder(attempt), entry.notebook)


def _was_cut_off(folder: Path, entry: Entry) -> bool:
    """Whether its time was over, or it was killed, or is lost without a trace but a log; not if a person ended it."""
    ended, status = entry.steps[-1].note, _status(folder, entry)
    lost = {f.name for f in folder.iterdir()} == {LOG}
    return status == "deadline" or (ended.startswith("ERROR") and (status == "running" or lost))


def _status(folder: Path, entry: Entry) -> str | None:
    """Of the session, in its own words; None where they are not of this attempt, or cannot be read."""
    try:
        found = outcome.read(folder)
        outcome.require_own(found, entry)
    except ResultError:
        return None
    return found.status


def _may_be_alive(service: Service, entry: Entry) -> bool:
    """Whether a run that is over to us still computes, say because it was started without one of its sources."""
    if entry.url is None:
        return False
    status, _ = service.status(entry.run) or ("UNKNOWN", "")
    return status in _ALIVE and entry.age < timedelta(seconds=entry.session_seconds) + GRACE


def _size(files: Sequence[Path]) -> int:
    return sum(f.stat().st_size for f in files)


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
