"""Guards of numbers, each against a pass broken on purpose, and what is known before weights are read."""

import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import world

from eaftlib.engine import forward, observers, ranks, traversal
from eaftlib.engine.experts import ExpertProbe
from eaftlib.engine.selftest import selftest
from eaftlib.engine.variants import Variant
from eaftlib.engine.weights import Weights
from eaftlib.errors import PackError, ParameterError, ScoringError
from eaftlib.evaluation import evaluate as evaluation
from eaftlib.files import require_writable_folder
from eaftlib.pruning.keepsets import KeepSet
from eaftlib.recovery import recover as recovery
from eaftlib.text.harmony import completion_spans
from eaftlib.text.packs import pack_blocks


@pytest.fixture(scope="module")
def weights(checkpoint, cpu):
    return Weights(checkpoint, cpu)


@pytest.fixture(autouse=True)
def one_block_at_once(monkeypatch):
    monkeypatch.setitem(traversal.MICRO_BATCH_TOKENS, "cpu", 40)


def test_a_block_that_no_rank_scored_is_named(weights, blocks, monkeypatch):
    batches, lost = traversal.Traversal._my_batches, int(np.flatnonzero(blocks.kept.any(1))[-1])
    monkeypatch.setattr(
        traversal.Traversal, "_my_batches", lambda self: [b for b in batches(self) if int(b[0]) != lost]
    )
    kept = blocks.kept[lost].sum()
    with pytest.raises(
        ScoringError, match=rf"block {lost}: 0 tokens were scored, expected its {kept} kept ones \(1 such"
    ):
        forward.score(weights, blocks, progress=False)


def test_blocks_that_two_ranks_scored_are_counted(weights, blocks, monkeypatch):
    monkeypatch.setattr(ranks, "add_up", lambda tensors: [t.mul_(2) for t in tensors])
    counts = blocks.kept.sum(1)
    first = int(np.flatnonzero(counts)[0])
    expected = (
        rf"block {first}: {2 * counts[first]} tokens were scored, .* its {counts[first]} .*{(counts > 0).sum()} such"
    )
    with pytest.raises(ScoringError, match=expected):
        forward.score(weights, blocks, progress=False)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda expert, gate: (expert, gate * 0.9), r"router weights sum to 0\.(9|89999)\d*, expected 1 "),
        (lambda expert, gate: (expert, gate * float("nan")), "router weights sum to nan, expected 1 "),
        (
            lambda expert, gate: (expert[:, :1].expand_as(expert), gate),
            r"experts \[(\d), \1\], expected 2 different .* 8",
        ),
        (lambda expert, gate: (expert + 8, gate), r"experts \[\d+, \d+\], expected 2 different ones below 8"),
    ],
)
def test_routing_that_does_not_add_up_is_named(weights, blocks, monkeypatch, spoil, message):
    record = ExpertProbe.record
    block, position = np.argwhere(observers.recorded_positions(blocks))[0]

    def spoilt(self, expert, gate, *measures):
        record(self, *(spoil(expert, gate) if self.layer == 2 else (expert, gate)), *measures)

    monkeypatch.setattr(ExpertProbe, "record", spoilt)
    with pytest.raises(ScoringError, match=rf"layer 2, block {block}, position {position}: {message}"):
        forward.score(weights, blocks, record_experts=True, progress=False)


def test_the_selftest_finds_no_difference_and_says_so(weights, blocks, capsys):
    selftest(weights, blocks)
    first = next(kept for kept in blocks.kept if kept.any())
    assert f"{first.sum()} tokens: no difference" in capsys.readouterr().out


@pytest.mark.parametrize("others, name", [(True, "a keep-set of all experts"), (False, "the whole model again")])
def test_the_selftest_finds_one_unit_in_the_last_place(weights, blocks, monkeypatch, others, name):
    run, seen = Variant.run, []

    def drifting(self, index, layer, hidden, **inputs):
        seen.append(self)
        spoils = self._keep is not None if others else self is not seen[0]
        return run(self, index, layer, hidden, **inputs) * (1 + 2**-23 if spoils and index == 1 else 1)

    monkeypatch.setattr(Variant, "run", drifting)
    with pytest.raises(ScoringError, match=rf"self-test: {name} differs .* in nll, at \d+ of \d+ tokens, expected 0"):
        selftest(weights, blocks)


@pytest.mark.parametrize("least, tried", [(240, True), (241, False)])
def test_only_a_long_evaluation_begins_with_the_selftest(checkpoint, source, cpu, tmp_path, monkeypatch, least, tried):
    """One pack, 3 blocks of 40, two models: 240 tokens."""
    calls = []

    def noted(weights, blocks, progress):
        calls.append([*tmp_path.iterdir()])
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "selftest", noted)
    monkeypatch.setattr(evaluation, "LONG_TOKENS", least)
    monkeypatch.setattr(forward, "score", noted)
    settings = {"seq_lens": [40], "num_blocks": 3, "only": ["pack_a"], "progress": False}
    every = KeepSet(np.tile(np.arange(world.EXPERTS), (world.LAYERS, 1)), world.EXPERTS, {"criterion": "reap"})
    error = KeyboardInterrupt if tried else TypeError
    with pytest.raises(error):
        evaluation.evaluate(checkpoint, source, cpu, {"base": None, "all": every}, out_dir=tmp_path, **settings)
    assert calls == ([[]] if tried else [])


def no_weights(*args, **settings):
    raise AssertionError("weights were read")


def test_an_out_dir_that_is_a_file_is_found_before_text_and_weights_are_read(
    checkpoint, source, cpu, blocks, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    for module, name in ((evaluation, "Weights"), (evaluation, "pack_blocks"), (recovery, "Weights")):
        monkeypatch.setattr(module, name, no_weights)
    for out_dir in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(ParameterError, match=r"file.*is no folder that can be written to.*choose another one"):
            evaluation.evaluate(
                checkpoint, source, cpu, {"base": None}, seq_lens=[40], num_blocks=1, out_dir=out_dir, progress=False
            )
    with pytest.raises(ParameterError, match=r"file.*choose another one"):
        recover(checkpoint, blocks, cpu, tmp_path / "file" / "deeper")


def test_a_recovery_beyond_the_models_context_is_refused_before_weights_are_read(
    checkpoint, blocks, cpu, tmp_path, monkeypatch
):
    monkeypatch.setattr(recovery, "Weights", no_weights)
    long = replace(blocks, tokens=np.zeros((2, 1025), np.int32), kept=np.ones((2, 1025), bool), row=None)
    with pytest.raises(ParameterError, match="found 1025, expected 2 to 1024, the model's longest context"):
        recover(checkpoint, long, cpu, tmp_path / "out")


def recover(checkpoint, blocks, cpu, out_dir):
    settings = {"parts": ["routers"], "attention_rank": None, "held_out_blocks": 1, "schedule": None, "settings": {}}
    recovery.recover(
        checkpoint, None, blocks, cpu, objective=SimpleNamespace(entropy_topk=20), out_dir=out_dir, **settings
    )


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_name_that_no_folder_can_have_is_refused(tmp_path, name):
    with pytest.raises(ParameterError, match="is no folder that can be written to"):
        require_writable_folder(tmp_path / name, ParameterError)
    require_writable_folder(tmp_path / "new" / "newer", ParameterError)
    assert not [*tmp_path.iterdir()]


@pytest.mark.skipif(os.geteuid() == 0, reason="modes do not bind root")
def test_a_folder_without_the_right_to_write_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ParameterError, match="is no folder that can be written to"):
        require_writable_folder(tmp_path / "new", ParameterError)


def test_more_tokens_than_int32_counts_are_refused_before_rows_are_read(source, tokenizer):
    with pytest.raises(PackError, match=r"found 16384 x 131072 tokens, expected at most 2147483647"):
        pack_blocks(source, "pack_a", tokenizer, completion_spans, seq_len=131_072, num_blocks=16_384)
