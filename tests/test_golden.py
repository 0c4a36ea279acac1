"""The same numbers as earlier versions of the library: see golden/README.md."""

import contextlib
import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import world

from eaftlib.errors import ResultError
from eaftlib.evaluation import results
from eaftlib.evaluation.compare import compare
from eaftlib.evaluation.evaluate import evaluate
from eaftlib.model.checkpoint import Checkpoint
from eaftlib.pruning.criteria import CRITERIA, RegionWeights, expert_sums, token_weights
from eaftlib.pruning.keepsets import from_ranking
from eaftlib.pruning.ranking import ranking_of, write_ranking
from eaftlib.pruning.slicing import prune
from eaftlib.pruning.trace import record
from eaftlib.text.harmony import completion_spans
from eaftlib.text.packs import PackSource, pack_blocks

GOLDEN = Path(__file__).parent / "golden"
LABELS = ["base", "eaft_reap-6"]
PASSES = [("UNION", 24), ("UNION", 40)]


@pytest.fixture(scope="module")
def made(tmp_path_factory, cpu):
    """A folder with what is in golden/, made now."""
    folder, threads = tmp_path_factory.mktemp("made"), torch.get_num_threads()
    torch.set_num_threads(1)
    with contextlib.chdir(folder):
        world.write_checkpoint(Path("model"))
        world.write_packs(Path("packs"))
        checkpoint, source = Checkpoint("model"), PackSource("packs")
        blocks = pack_blocks(
            source, "UNION", checkpoint.tokenizer, completion_spans, seq_len=40, num_blocks=5, rows="calib"
        )
        trace, _ = record(checkpoint, blocks, cpu, progress=False)
        sums = expert_sums(trace, token_weights(trace, 0.15, RegionWeights()), "predictor")
        settings = {"packs": "packs", "pack_files": None, "cc_quantile": 0.15}
        settings |= {"w_good": 1.0, "w_uncertain": 0.25, "w_conflict": -2.0, "align": "predictor"}
        ranking = ranking_of(trace, sums, [*CRITERIA, "random"], settings=settings, seed=3)
        write_ranking(Path("ranking"), ranking, sums)
        best = from_ranking(checkpoint, ranking="ranking", criterion="eaft_reap", keep_n=6, multiple_of=2)
        keep_sets = dict(zip(LABELS, [None, best], strict=True))
        lengths = [length for _, length in PASSES]
        options = {"seq_lens": lengths, "num_blocks": 6, "only": ["UNION"], "rows": "eval", "progress": False}
        evaluate(checkpoint, source, cpu, keep_sets, out_dir="evaluation", **options)
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """golden/ with its results as they were written."""
    folder = tmp_path_factory.mktemp("golden")
    for label in LABELS:
        packed = GOLDEN / "evaluation" / f"{label}.json.gz"
        (folder / f"{label}.json").write_bytes(gzip.decompress(packed.read_bytes()))
        tokens = f"{label}.tokens.parquet"
        (folder / tokens).write_bytes((GOLDEN / "evaluation" / tokens).read_bytes())
    return folder


def same(found, expected, where="", new=(), other=()):
    """Integers, strings and the order of keys are equal, floats to 1e-6.

    new: keys that ``found`` has besides; other: keys whose values may differ.
    """
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert [key for key in found if key not in new] == list(expected), where
        for key in expected.keys() - set(other):
            same(found[key], expected[key], f"{where}.{key}", new, other)
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, pair in enumerate(zip(found, expected, strict=True)):
            same(*pair, f"{where}[{i}]", new, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-6), where
    else:
        assert found == expected, where


VERSIONS = ["engine", "code_sha256", "torch", "transformers_version", "python"]
HASHES = ["model_sha256", "ranking_sha256", "tokens_sha256", "saliency_sha256", "sha256"]


@pytest.mark.parametrize("label", LABELS)
def test_a_result_holds_the_same_numbers(made, golden, label):
    found, expected = (json.loads((folder / f"{label}.json").read_text()) for folder in (made / "evaluation", golden))
    same(found, expected, new=["eos_token_id", "input_sha256", "recovered"], other=[*VERSIONS, *HASHES, "tok_s_pred"])
    assert found["meta"]["eos_token_id"] == 1 and found["meta"]["model_sha256"] != expected["meta"]["model_sha256"]
    for pack in found["packs"]:
        assert all(len(entry["input_sha256"]) == 64 for entry in pack["seq"].values())


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("key", PASSES)
def test_a_result_has_the_same_tokens(made, golden, label, key):
    found, expected = (results.read(folder / f"{label}.json").tokens(*key) for folder in (made / "evaluation", golden))
    for name in ("block", "position"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    for name in ("nll", "entropy"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-6)


@pytest.mark.parametrize("key", PASSES)
def test_a_result_is_compared_with_an_earlier_one(made, golden, key):
    found = compare(results.read(made / "evaluation" / "eaft_reap-6.json"), results.read(golden / "base.json"), *key)
    expected = compare(*(results.read(golden / f"{label}.json") for label in reversed(LABELS)), *key)
    assert found.ppl.value == pytest.approx(expected.ppl.value, rel=1e-5) and not found.binned
    assert found.js2d.value == pytest.approx(expected.js2d.value) and found.cc_rate_at_base == expected.cc_rate_at_base


def test_an_earlier_result_does_not_become_part_of_one_of_today(made, golden):
    for name, folder, drop in (("today", made / "evaluation", "40"), ("earlier", golden, "24")):
        content = json.loads((folder / "base.json").read_text())
        del content["packs"][0]["seq"][drop]
        (made / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(ResultError, match=r"model_sha256 is \w+ against \w+; eos_token_id is None against 1\."):
        results.read_all([str(made / "today.json"), str(made / "earlier.json")])


def test_a_ranking_is_the_same(made):
    found, expected = (json.loads((folder / "ranking" / "ranking.json").read_text()) for folder in (made, GOLDEN))
    same(found, expected, new=["eos_token_id"], other=[*HASHES])


def test_the_sums_behind_a_ranking_are_the_same(made):
    found, expected = (pq.read_table(folder / "ranking" / "saliency.parquet") for folder in (made, GOLDEN))
    assert found.column_names == expected.column_names
    # Sums of |w| g n until then, plain sums of g n since.
    for name in set(expected.column_names) - {"pos_gate_norm_sum", "neg_gate_norm_sum"}:
        assert found.schema.field(name).type == expected.schema.field(name).type
        np.testing.assert_allclose(found[name].to_numpy(), expected[name].to_numpy(), rtol=1e-6, err_msg=name)


def test_a_ranking_that_knows_its_model_by_the_routers_is_not_accepted(made):
    with contextlib.chdir(made), pytest.raises(ResultError, match="Rankings of earlier versions"):
        from_ranking(Checkpoint("model"), ranking=GOLDEN / "ranking", criterion="eaft_reap", keep_n=6)


def test_a_pruned_checkpoint_is_the_same_byte_for_byte(made, tmp_path):
    """Shards, index, configuration, mapping and everything that comes along, by the SHA-256 of each file."""
    with contextlib.chdir(made):
        checkpoint = Checkpoint("model")
        keep = from_ranking(checkpoint, ranking="ranking", criterion="eaft_reap", keep_n=6, multiple_of=2)
        manifest = prune(checkpoint, keep, tmp_path / "pruned", progress=False)
    assert manifest["sha256"] == json.loads((GOLDEN / "pruned.json").read_text())
