"""How runs are getting on: what the service says of each, taken into the ledger."""

import functools
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta

from ..errors import KaggleError
from . import ledger
from .ledger import Entry
from .service import Service

# What the service says may lag behind: a kernel just pushed may be unknown, or show its previous version's end.
GRACE = timedelta(minutes=15)
_ENDED = ("COMPLETE", "ERROR", "CANCEL_ACKNOWLEDGED")

Say = Callable[[str], None]
say_now = functools.partial(print, flush=True)  # also where nobody watches but a log file


def follow(service: Service, runs: Sequence[str] = (), say: Say = say_now) -> list[Entry]:
    """Ask the service about every run that has not ended (of ``runs``, or of all the account's); returns their entries.

    One that cannot be asked about is mentioned.
    """
    entries = []
    with ledger.locked():
        for entry in chosen(service, runs):
            try:
                entries.append(refresh(service, entry))
            except KaggleError as error:
                say(f"{entry.run}  {error}")
    return entries


def describe(entry: Entry) -> str:
    """One line: the run, its state and for how long, and what to know about it."""
    minutes = int((datetime.now(UTC) - entry.since).total_seconds() // 60)
    note = entry.steps[-1].note
    told = {
        "queued": note or entry.params_file,
        "verified": str(entry.result_folder),
        "failed": note,
        "unfinished": note,
    }
    told["pushing"] = "whether it arrived is not known: repeat make kaggle-push"
    return f"{entry.run}  {entry.state} {minutes} min  {told.get(entry.state, entry.url)}"


def counts(service: Service) -> str:
    states = [entry.state for entry in ledger.owned_by(service.owner)]
    return " · ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))


def chosen(service: Service, runs: Sequence[str]) -> list[Entry]:
    """The named runs, or all of the account."""
    own = {entry.run: entry for entry in ledger.owned_by(service.owner)}
    if unknown := [run for run in runs if run not in own]:
        if other := ledger.find(unknown[0]):
            other.require_owner(service.owner)
        raise KaggleError(f"no run {unknown[0]!r} in {ledger.ROOT}; it has {sorted(own) or 'none'}")
    return [own[run] for run in runs] or list(own.values())


def refresh(service: Service, entry: Entry) -> Entry:
    """The entry with the service's word taken in."""
    if not entry.active:
        return entry
    entry.require_owner(service.owner)
    if entry.state == "pushing" and not (entry := arrived(service, entry) or entry).url:
        return entry
    answer = service.status(entry.run)
    if answer is None:
        return _unknown(entry)
    if entry.unknown_since:
        entry = entry.enter(entry.state, "is there again", unknown_since=None)
    status, message = answer
    first_seen, limit = entry.running_since, timedelta(seconds=entry.session_seconds) + GRACE
    if status not in _ENDED and first_seen and datetime.now(UTC) - first_seen > limit:
        status, message = "ERROR", f"the service still says {status}, long after the session's limit"
    if status in _ENDED:
        return entry.enter("ended", f"{status} {message}".strip())
    if status == "RUNNING" and entry.state == "submitted":
        return entry.enter("running")
    return entry


def arrived(service: Service, entry: Entry) -> Entry | None:
    """The entry as submitted, if the service shows a kernel of its present attempt."""
    there = service.source(entry.run)
    if there is None or f"'attempt': {entry.attempt}," not in there[0]:
        return None
    url = f"https://www.kaggle.com/code/{entry.ref}"
    return entry.enter("submitted", "is there", version=there[1], url=url)


def _unknown(entry: Entry) -> Entry:
    """Denied for a moment, a kernel may be too new to be seen, or the service ill; denied for long, it is gone."""
    now = datetime.now(UTC)
    note = "the service has no such kernel, or does not show it to this account"
    if entry.unknown_since is None:
        return entry.enter(entry.state, note, unknown_since=now)
    return entry.enter("failed", note, unknown_since=None) if now - entry.unknown_since > GRACE else entry
