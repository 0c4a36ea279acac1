"""Every input that fuzzing has found to reach new code, once more: nothing foreign is raised, nothing wrong accepted."""

import sys
from pathlib import Path

import pytest

FAULTS = Path(__file__).parent / "faults"
sys.path.insert(0, str(FAULTS))

import targets  # noqa: E402


@pytest.mark.parametrize("target", targets.TARGETS)
def test_the_corpus_of(target):
    check, inputs = targets.TARGETS[target](), sorted((FAULTS / "corpus" / target).iterdir())
    assert len(inputs) > 5
    for file in inputs:
        check(file.read_bytes())


def test_an_oracle_sees_a_span_that_is_off_by_one(monkeypatch):
    monkeypatch.setattr(
        targets, "completion_spans", lambda text: [(start, end + 1) for start, end in targets.spans_by_hand(text)]
    )
    with pytest.raises(AssertionError):
        pieces = ["<|start|>", "assistant", "<|message|>", "a", "<|end|>"]
        targets.spans()(b"".join(targets.PIECES.index(piece).to_bytes(2, "little") for piece in pieces))
