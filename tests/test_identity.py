"""What counts as the same evaluation: every change that changes a number must be seen, whoever asks."""

import contextlib
import json
import shutil

import numpy as np
import pytest
from test_checkpoint import edit_json, replace_tensor

from eaftlib.engine.placement import place
from eaftlib.engine.weights import Weights
from eaftlib.errors import ResultError
from eaftlib.evaluation import results
from eaftlib.evaluation.compare import require_comparable
from eaftlib.evaluation.evaluate import evaluate
from eaftlib.evaluation.identity import FACTS, Identity, Question
from eaftlib.model.checkpoint import Checkpoint
from eaftlib.text.packs import Blocks, PackSource

ONE = {"seq_lens": [96], "num_blocks": 6, "only": ["UNION"], "progress": False}
KEY = ("UNION", 96)


@pytest.fixture(scope="module")
def before(model_folder, packs_folder, cpu, tmp_path_factory):
    """A folder with a model, and its result under the label x."""
    folder = tmp_path_factory.mktemp("before")
    shutil.copytree(model_folder, folder / "model")
    run(folder, cpu, packs_folder)
    return folder


@pytest.fixture
def there(before, tmp_path):
    return shutil.copytree(before, tmp_path / "there")


def run(folder, placement, packs, label="x", out="out", **changes):
    """Evaluate the model in ``folder`` as it lies there now, always under the same ``model_id``; returns the result."""
    with contextlib.chdir(folder):
        settings = ONE | changes
        evaluate(Checkpoint("model"), PackSource(str(packs)), placement, {label: None}, out_dir=out, **settings)
    return results.read(folder / out / f"{label}.json")


def tensor(name, change):
    def apply(folder):
        stored = Checkpoint(str(folder)).tensor(name).clone()
        change(stored)
        replace_tensor(folder, name, stored)

    return apply


def config(**fields):
    return lambda folder: edit_json(folder / "config.json", lambda content: content.update(fields))


OTHER_MODELS = {
    "LM head": tensor("lm_head.weight", lambda t: t.mul_(3)),
    "one expert": tensor("model.layers.1.mlp.experts.down_proj_blocks", lambda t: t[3].bitwise_xor_(0x11)),
    "attention": tensor("model.layers.2.self_attn.v_proj.weight", lambda t: t.mul_(2)),
    "rope_theta": config(rope_theta=500.0),
    "sliding_window": config(sliding_window=3),
    "swiglu_limit": config(swiglu_limit=0.5),
}


@pytest.mark.parametrize("changed", OTHER_MODELS)
def test_another_models_result_does_not_pass_for_this_ones(there, cpu, packs_folder, changed):
    old = (there / "out" / "x.json").read_bytes()
    OTHER_MODELS[changed](there / "model")
    with pytest.raises(ResultError, match=r"x\.json is the result of another model: model_sha256 is \w+ against \w+\."):
        run(there, cpu, packs_folder)
    assert (there / "out" / "x.json").read_bytes() == old
    again, fresh = run(there, cpu, packs_folder, label="y"), run(there, cpu, packs_folder, out="fresh")
    assert number(again) == number(fresh) != json.loads(old)["packs"][0]["seq"]["96"]["model"]["ppl"]


def number(result):
    return result.entries[KEY]["model"]["ppl"]


def other_eos(folder):
    edit_json(folder / "tokenizer_config.json", lambda c: c.update(eos_token="<|call|>"))


def other_merges(folder):
    def change(content):
        content["model"]["merges"] = content["model"]["merges"][:-20]

    edit_json(folder / "tokenizer.json", change)


@pytest.mark.parametrize("change", [other_eos, other_merges])
def test_a_result_of_other_tokens_is_set_aside(there, cpu, packs_folder, change):
    old = number(results.read(there / "out" / "x.json"))
    change(there / "model")
    again, fresh = run(there, cpu, packs_folder), run(there, cpu, packs_folder, out="fresh")
    assert number(again) == number(fresh) != old
    assert again.entries[KEY]["input_sha256"] == fresh.entries[KEY]["input_sha256"]


def test_the_same_model_and_tokens_are_not_scored_again(there, cpu, packs_folder, monkeypatch):
    monkeypatch.setattr(Weights, "_read", lambda *a: pytest.fail("weights were read"))
    assert number(run(there, cpu, packs_folder)) > 0


def test_a_result_of_an_earlier_version_is_set_aside_though_its_model_cannot_be_told(there, cpu, packs_folder):
    def change(content):
        del content["meta"]["eos_token_id"]
        content["meta"]["model_sha256"] = "of the routers"

    edit_json(there / "out" / "x.json", change)
    old = (there / "out" / "x.json").read_bytes()
    assert "eos_token_id" in run(there, cpu, packs_folder).meta
    assert (there / "out" / "x.json.old").read_bytes() == old


def test_results_of_a_damaged_copy_and_of_the_whole_model_do_not_become_one(there, cpu, packs_folder):
    OTHER_MODELS["one expert"](there / "model")
    run(there, cpu, packs_folder, out="damaged", seq_lens=[40])
    with pytest.raises(ResultError, match=r"'x' occurs in .*not one model's .*model_sha256 is \w+ against \w+"):
        results.read_all([str(there / "out"), str(there / "damaged")])


def test_results_of_two_precisions_do_not_become_one(there, packs_folder):
    half = place("cpu", "bfloat16")
    run(there, half, packs_folder, out="half", seq_lens=[40])
    with pytest.raises(ResultError, match=r"'x' occurs in .*: dtype is bfloat16 against float32"):
        results.read_all([str(there / "out"), str(there / "half")])


def test_results_of_one_model_become_one_and_compare(there, cpu, packs_folder):
    run(there, cpu, packs_folder, out="longer", seq_lens=[40])
    (merged,) = results.read_all([str(there / "out"), str(there / "longer")])
    assert set(merged.entries) == {KEY, ("UNION", 40)}
    run(there, cpu, packs_folder, label="y", seq_lens=[40, 96])
    require_comparable(results.read(there / "out" / "y.json"), merged, "UNION", 40)


def test_results_of_different_tokens_are_not_compared_though_their_rows_are_the_same(there, cpu, packs_folder):
    base = results.read(there / "out" / "x.json")
    other_eos(there / "model")
    other = run(there, cpu, packs_folder, label="y")
    assert other.entries[KEY]["rows_sha256"] == base.entries[KEY]["rows_sha256"]
    words = (
        r"y cannot be compared with x on UNION at 96: eos_token_id is 7 against 1; input_sha256 is \w+ against \w+\."
    )
    with pytest.raises(ResultError, match=words):
        require_comparable(other, base, *KEY)


@pytest.fixture(scope="module")
def recorded(before):
    """What a result records: its meta, and its entry with pack and length."""
    result = results.read(before / "out" / "x.json")
    return result.meta, result.entries[KEY] | {"pack": KEY[0], "seq_len": KEY[1]}


def test_a_run_goes_on_only_from_the_same_of_all_that_is_recorded(recorded):
    """But for how far the earlier one came."""
    meta = {place.removeprefix("meta.") for place, decides in FACTS.items() if Question.RESUMABLE in decides}
    assert meta >= recorded[0].keys() - {"seq_lens", "tokens_sha256"}
    assert {"entry.rows_sha256", "entry.input_sha256"} <= FACTS.keys()


def test_every_fact_is_recorded(recorded):
    facts = Identity.of(*recorded).facts
    assert {place for place in FACTS if facts[place] is None} == {
        "meta.keep_set", "meta.recovered", "meta.gpu_name",
    }  # fmt: skip


MODEL = ["model_sha256", "keep_set", "recovered", "dtype"]
SETTINGS = ["tokenizer_sha256", "eos_token_id", "rows", "num_blocks", "entropy_topk", "cc_quantile"]
INPUT = ["pack", "seq_len", "rows_seen", "rows_sha256", "input_sha256"]
MACHINE = ["label", "model_id", "num_experts", "top_k", "bytes_total", "dataset_repo", "pack_files", "scored_with"]
MACHINE += ["engine", "code_sha256", "device", "gpu_name", "torch", "transformers_version", "python"]


@pytest.mark.parametrize(
    "question, names",
    [
        (Question.COMPARABLE, [*SETTINGS, *INPUT, "kept_tokens", "xbins", "ybins"]),
        (Question.MERGEABLE, [*MODEL, *SETTINGS]),
        (Question.RESUMABLE, [*MODEL, *SETTINGS, *INPUT, *MACHINE]),
        (Question.SAME_MODEL, ["model_sha256", "keep_set", "recovered"]),
    ],
)
def test_which_facts_decide_which_question(recorded, question, names):
    mine = Identity.of(*recorded)
    found = {}
    for fact in FACTS:
        other = Identity(mine.facts | {fact: "other"})
        assert not other.differences(other, question)
        found |= {d.name: str(d) for d in other.differences(mine, question)}
    assert found.keys() == set(names)
    values = {place.split(".")[-1]: value for place, value in mine.facts.items()}
    assert found == {name: f"{name} is other against {values[name]}" for name in names}


def test_every_difference_is_named(recorded):
    mine = Identity.of(*recorded)
    other = Identity(mine.facts | {"meta.num_blocks": 7, "entry.rows_sha256": "r", "meta.dtype": "bfloat16"})
    names = [difference.name for difference in other.differences(mine, Question.COMPARABLE)]
    assert names == ["num_blocks", "rows_sha256"]


@pytest.mark.parametrize("place", [place for place, decides in FACTS.items() if Question.COMPARABLE in decides])
def test_what_an_earlier_file_does_not_record_decides_only_a_comparison(recorded, place):
    whole = Identity.of(*recorded)
    lacking = Identity(whole.facts | {place: None})
    for one, other in ((whole, lacking), (lacking, whole)):
        assert not one.differences(other, Question.COMPARABLE)
        for question in (Question.MERGEABLE, Question.RESUMABLE):
            assert bool(one.differences(other, question)) == (question in FACTS[place])


def test_input_sha256_covers_tokens_mask_and_shape():
    tokens, kept = np.arange(24, dtype=np.int32).reshape(4, 6), np.arange(24).reshape(4, 6) % 3 == 0

    def digest(tokens, kept):
        return Blocks("a", "all", tokens, kept, 1, "r").input_sha256

    other_token, other_kept = tokens.copy(), kept.copy()
    other_token[3, 5], other_kept[3, 5] = 70000, True
    cases = [(tokens, kept), (other_token, kept), (tokens, other_kept), (tokens.reshape(6, 4), kept.reshape(6, 4))]
    assert len({digest(*case) for case in cases}) == len(cases)
    assert digest(tokens, kept) == digest(np.asfortranarray(tokens), np.asfortranarray(kept))
