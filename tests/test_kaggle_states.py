"""The table of states: a run takes no other way than the table's, and every state of the table can be reached."""

import itertools

import pytest

from eaftlib.errors import KaggleError
from eaftlib.kaggle import ledger, states

PAIRS = list(itertools.product(states.STATES, [s for s in states.STATES if s != states.NEW]))
FACTS = dict.fromkeys(("notebook", "params_file", "params_sha256", "code_sha256", "commit"), "x")


def entry_in(state):
    steps = [] if state == states.NEW else [ledger.Step(state=state, at="2026-01-01T00:00:00+00:00")]
    return ledger.Entry(run="eaft-x", ref="tester/eaft-x", params={}, session_seconds=1, steps=steps, **FACTS)


@pytest.mark.parametrize("before, after", PAIRS)
def test_only_the_ways_of_the_table_are_open(tmp_path, monkeypatch, before, after):
    monkeypatch.chdir(tmp_path)
    entry = entry_in(before)
    if after in states.STATES[before].then:
        assert entry.enter(after).state == after and ledger.find("eaft-x").state == after
    else:
        with pytest.raises(KaggleError, match=f"eaft-x is {before}; it cannot become '{after}', only one of"):
            entry.enter(after)
        assert ledger.find("eaft-x") is None  # nothing was written


def test_what_a_run_can_live_through():
    """Written down a second time, by hand: a way that is added or lost is noticed."""
    ways = {f"{before} {after}" for before, state in states.STATES.items() for after in state.then}
    assert ways == {
        "new queued", "queued pushing", "queued failed", "pushing pushing", "pushing submitted", "pushing queued",
        "pushing failed", "submitted submitted", "submitted running", "submitted ended", "submitted failed",
        "running running", "running ended", "running failed", "ended verified", "ended failed", "ended submitted",
        "verified submitted", "failed queued", "failed submitted", "ended unfinished", "unfinished queued",
        "unfinished submitted",
    }  # fmt: skip
    assert states.ACTIVE == ("pushing", "submitted", "running")


def test_every_state_is_reached_and_none_is_unknown():
    reached = {after for state in states.STATES.values() for after in state.then}
    assert reached == set(states.STATES) - {states.NEW}
