"""The states of a run and the ways between them: one table, which the ledger holds every step to."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class State:
    """What a state means, which states may follow and when, and whether the run may hold a GPU session."""

    means: str
    then: dict[str, str]
    active: bool = False


NEW = "new"
STATES = {
    NEW: State("not in the ledger", {"queued": "its push folder is built"}),
    "queued": State(
        "waits to be pushed",
        {"pushing": "about to be pushed: written down before it is", "failed": "a data set that it needs is not whole"},
    ),
    "pushing": State(
        "pushed, or about to be: whether it arrived is not known",
        {
            "pushing": "it did not arrive, and is pushed again",
            "submitted": "the service has it",
            "queued": "a limit of the account, or its credentials: later",
            "failed": "the service refused it",
        },
        active=True,
    ),
    "submitted": State(
        "the service has it",
        {
            "submitted": "the service denies it for a moment, or shows it again",
            "running": "its session was seen running",
            "ended": "its session is over",
            "failed": "it lacks a source, or the service has denied it for long",
        },
        active=True,
    ),
    "running": State(
        "its session was seen running",
        {
            "running": "the service denies it for a moment, or shows it again",
            "ended": "its session is over",
            "failed": "the service has denied it for long",
        },
        active=True,
    ),
    "ended": State(
        "its session is over, its output not yet here",
        {
            "verified": "its results are here, complete and its own",
            "unfinished": "at its deadline, or cut off: another session goes on",
            "failed": "they are not, and another session would not help",
            "submitted": "what the service still shows is the attempt before",
        },
    ),
    "unfinished": State(
        "its session is over, its work is not",
        {"queued": "another session goes on", "submitted": "the service shows its attempt: looked at again"},
    ),
    "verified": State("its results are here", {"submitted": "they were removed, and are fetched again"}),
    "failed": State(
        "given up",
        {"queued": "it is resumed: another attempt", "submitted": "the service shows its attempt: looked at again"},
    ),
}
Name = Literal[*(name for name in STATES if name != NEW)]
ACTIVE = tuple(name for name, state in STATES.items() if state.active)
