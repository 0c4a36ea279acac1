"""The self-test before a long run: passes on a sound model, and names the first token of one that is not."""

import pytest
import torch

from eaftlib.engine import selftest
from eaftlib.engine.variants import Variant
from eaftlib.engine.weights import Weights
from eaftlib.errors import ScoringError
from eaftlib.evaluation.evaluate import evaluate


@pytest.fixture
def weights(checkpoint, cpu):
    return Weights(checkpoint, cpu)


def test_a_sound_model_passes(weights, blocks):
    selftest.require_sound(weights, blocks)


@pytest.mark.parametrize("faulty, name", [(1, "the model again"), (2, "all experts kept")])
def test_one_wrong_bit_in_one_of_the_passes_is_found(weights, blocks, monkeypatch, faulty, name):
    """What a kernel that races, or a bit that flips, does: one variant's hidden state is off once, by one rounding."""
    norm, calls = Variant.norm, []

    def off_once(self, hidden):
        calls.append(self)
        found = norm(self, hidden)
        return torch.nextafter(found, found + 1) if len(calls) == faulty + 1 else found

    monkeypatch.setattr(Variant, "norm", off_once)
    with pytest.raises(ScoringError, match=f"self-test on block .*{name}"):
        selftest.require_sound(weights, blocks)


def test_masking_that_removes_a_kept_expert_is_found(weights, blocks, monkeypatch):
    masked = type(weights.family).masked_routing

    def too_much(self, keep, parameter):
        return masked(self, keep & (torch.arange(len(keep)) > 0), parameter)

    monkeypatch.setattr(type(weights.family), "masked_routing", too_much)
    with pytest.raises(ScoringError, match="all experts kept"):
        selftest.require_sound(weights, blocks)


def test_an_evaluation_that_fails_it_writes_nothing(checkpoint, source, cpu, tmp_path, monkeypatch):
    def unsound(*_):
        raise ScoringError("self-test")

    monkeypatch.setattr(selftest, "require_sound", unsound)
    with pytest.raises(ScoringError, match="self-test"):
        evaluate(checkpoint, source, cpu, {"base": None}, seq_lens=[40], num_blocks=4, out_dir=tmp_path, progress=False)
    assert not list(tmp_path.glob("*.json"))


def test_the_block_with_most_kept_tokens_is_taken(weights, blocks, monkeypatch):
    score, taken = selftest.forward.score, []
    monkeypatch.setattr(selftest.forward, "score", lambda w, few, **more: taken.append(few) or score(w, few, **more))
    selftest.require_sound(weights, blocks)
    assert len(taken[0].tokens) == 1 and taken[0].kept.sum() == blocks.kept.sum(1).max() > 0
