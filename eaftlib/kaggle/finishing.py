"""Stay with runs over as many sessions as they take. Repeated, it goes on where it was stopped."""

import time
from collections.abc import Sequence
from datetime import datetime
from typing import Literal

from . import build, ledger, pushing, sessions
from .build import Settings
from .following import Say, chosen, counts, describe, say_now
from .ledger import Busy, Entry
from .pulling import bring, last_traceback
from .service import LimitReached, QuotaReached, Service, Unreachable

_SETTLED = ("verified", "failed")


def follow(
    service: Service,
    runs: Sequence[str] = (),
    *,
    at_limit: Literal["wait", "stop"] = "wait",
    poll_seconds: float = pushing.POLL_SECONDS,
    say: Say = say_now,
) -> list[Entry]:
    """Stay until each run is verified or failed: bring what has ended, push again what its session left unfinished.

    runs: these; else all of the account's that are not settled yet. at_limit ``stop``: raise LimitReached where a run waits
    for quota or a session, instead of waiting. Raises KaggleError.
    """
    settings = build.read_settings()
    names = [e.run for e in chosen(service, runs) if runs or e.state not in _SETTLED]
    said: dict[str, str] = {}
    while True:
        unclear = [reason for run in names if (reason := _step(service, run, settings, said, say))]
        limit = pushing.submit_queued(service, names, settings.gpu_sessions, say)
        entries = [ledger.find(run) for run in names]
        if all(entry.state in _SETTLED for entry in entries):
            return entries
        waiting = sum(entry.state == "queued" for entry in entries)
        if waiting and at_limit == "stop" and isinstance(limit, LimitReached):
            raise type(limit)(f"{limit}; {waiting} run(s) wait: repeat the command later")
        reasons = [*unclear, *([f"waiting: {limit}"] if waiting else [])]
        _say_once(
            said, "", " | ".join([counts(service), *reasons]), lambda text: say(f"{datetime.now():%H:%M:%S}  {text}")
        )
        idle = waiting and isinstance(limit, QuotaReached) and not any(entry.active for entry in entries)
        time.sleep(poll_seconds * (pushing.QUOTA_POLLS if idle else 1))


def _step(service: Service, run: str, settings: Settings, said: dict[str, str], say: Say) -> str | None:
    """Take in how a run is getting on, and queue its next session; returns why that cannot be known now."""
    try:
        entry = ledger.find(run)
        if entry.active or entry.state == "ended":
            entry = bring(service, run)
        _say_once(said, run, f"{entry.state} {entry.attempt}", lambda _: say(describe(entry)))
        if entry.state == "failed" and (trace := last_traceback(entry)):
            _say_once(said, f"{run} trace", trace, say)
        if entry.state == "unfinished":
            entry = sessions.go_on(service, run, settings, say)
            _say_once(said, run, f"{entry.state} {entry.attempt}", lambda _: say(describe(entry)))
    except (Unreachable, Busy) as error:
        return f"{run}: {error}"
    return None


def _say_once(said: dict[str, str], about: str, text: str, say: Say) -> None:
    """Not again until it is something else."""
    if said.get(about) != text:
        say(text)
    said[about] = text
