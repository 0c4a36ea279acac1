"""evaluate end to end: its files against forward passes and aggregates put together by hand."""

import json

import numpy as np
import pytest
import world
from test_criteria import quantile
from test_forward import keep_masks, reference
from test_results import random_tokens, write

from eaftlib.engine import forward
from eaftlib.engine.weights import Weights
from eaftlib.errors import EaftError, PackError, ParameterError
from eaftlib.evaluation import evaluate as evaluation
from eaftlib.evaluation import results
from eaftlib.evaluation.compare import compare
from eaftlib.evaluation.evaluate import evaluate
from eaftlib.model.checkpoint import Checkpoint
from eaftlib.pruning.keepsets import KeepSet
from eaftlib.pruning.slicing import prune
from eaftlib.text.harmony import completion_spans
from eaftlib.text.packs import pack_blocks

SETTINGS = {"seq_lens": [24, 40], "num_blocks": 3, "only": ["UNION", "pack_a"], "rows": "all", "progress": False}


def keep_set(mask, **chosen_by):
    return KeepSet(np.stack([np.flatnonzero(m) for m in mask]), world.EXPERTS, {"criterion": "reap"} | chosen_by)


@pytest.fixture(scope="module")
def keep():
    return keep_set(keep_masks(1, 4)[0], ranking_rows="calib", ranking_sha256="abc")


@pytest.fixture(scope="module")
def folder(checkpoint, source, cpu, keep, tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    written = evaluate(checkpoint, source, cpu, {"base": None, "half": keep}, out_dir=out, **SETTINGS)
    assert written == [out / "base.json", out / "half.json"]
    return out


@pytest.mark.parametrize("label", ["base", "half"])
@pytest.mark.parametrize("pack", ["UNION", "pack_a"])
@pytest.mark.parametrize("seq_len", [24, 40])
def test_every_number_follows_from_transformers_logits(folder, source, tokenizer, hf_model, keep, label, pack, seq_len):
    blocks = pack_blocks(source, pack, tokenizer, completion_spans, seq_len=seq_len, num_blocks=3)
    nll, entropy, _ = reference(hf_model, blocks, removed=~keep.mask if label == "half" else None)
    found = results.read(folder / f"{label}.json")
    entry = found.entries[pack, seq_len]
    model, p = entry["model"], np.exp(-nll.numpy())
    assert (entry["rows_seen"], entry["rows_sha256"]) == (blocks.rows_seen, blocks.rows_sha256)
    assert model["kept_tokens"] == blocks.kept.sum() and model["blocks"]["kept"] == blocks.kept.sum(1).tolist()
    close = {"rel": 1e-4, "abs": 1e-5}
    assert model["mean_nll"] == pytest.approx(nll.mean().item(), **close)
    assert model["ppl"] == pytest.approx(nll.mean().exp().item(), **close)
    assert model["mean_prob"] == pytest.approx(p.mean(), **close)
    assert model["mean_entropy"] == pytest.approx(entropy.mean().item(), **close)
    assert model["p_thr"] == pytest.approx(quantile(p.tolist(), 0.15), **close)
    assert model["h_thr"] == pytest.approx(quantile(entropy.tolist(), 0.15), **close)
    tokens = found.tokens(pack, seq_len)
    assert np.stack([tokens.block, tokens.position]).tolist() == np.stack(np.nonzero(blocks.kept)).tolist()
    np.testing.assert_allclose(tokens.nll, nll, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(tokens.entropy, entropy, rtol=1e-4, atol=1e-4)


def test_meta_holds_the_fixed_names(folder, checkpoint, source, keep):
    meta = json.loads((folder / "half.json").read_text())["meta"]
    expected = {
        "label": "half",
        "model_id": checkpoint.model_id,
        "dataset_repo": source.source,
        "pack_files": ["pack_a.parquet", "pack_b.parquet", "pack_c.parquet"],
        "top_k": world.TOP_K,
        "entropy_topk": 20,
        "cc_quantile": 0.15,
        "num_blocks": 3,
        "seq_lens": [24, 40],
        "rows": "all",
        "gpu_name": None,
        "keep_set": keep.chosen_by,
    }
    assert expected.items() <= meta.items()
    assert {"engine", "torch", "transformers_version"} <= meta.keys()
    assert json.loads((folder / "base.json").read_text())["meta"]["keep_set"] is None


def test_a_result_entry_holds_the_fixed_names(folder):
    model = results.read(folder / "half.json").entries["UNION", 24]["model"]
    fixed = "ppl kept_tokens tok_s_pred mean_prob mean_entropy mean_nll var_nll p_thr h_thr cc_rate cc_count quadrants "
    fixed += "hist2d_x_H hist1d_x hist1d_H blocks kl_to_base top1_agreement"
    assert set(fixed.split()) <= model.keys()
    assert set(model["quadrants"]) == {"LL", "LH", "HL", "HH"}


def test_kl_and_agreement_are_means_over_kept_tokens(folder, source, tokenizer, hf_model, keep):
    blocks = pack_blocks(source, "UNION", tokenizer, completion_spans, seq_len=40, num_blocks=3)
    log_p, log_q = (reference(hf_model, blocks, removed=r)[2] for r in (None, ~keep.mask))
    model = results.read(folder / "half.json").entries["UNION", 40]["model"]
    assert model["kl_to_base"] == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), rel=1e-3)
    assert model["top1_agreement"] == pytest.approx((log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item())


def test_results_of_one_pass_compare(folder):
    found = compare(results.read(folder / "half.json"), results.read(folder / "base.json"), "UNION", 40)
    assert found.ppl.value != 0 and found.js2d.value > 0 and not found.binned


def test_all_packs_and_union_unless_only_says_otherwise(checkpoint, source, cpu, tmp_path):
    settings = SETTINGS | {"only": None, "seq_lens": [24], "num_blocks": 6}
    (path,) = evaluate(checkpoint, source, cpu, {"base": None}, out_dir=tmp_path, **settings)
    packs = [pack["pack"] for pack in json.loads(path.read_text())["packs"]]
    assert sorted(packs) == ["UNION", "pack_a", "pack_b", "pack_c"]


def test_calib_and_eval_rows_do_not_mix(checkpoint, source, cpu, tmp_path):
    hashes = set()
    for rows in ("calib", "eval", "all"):
        settings = SETTINGS | {"rows": rows, "only": ["UNION"], "seq_lens": [24], "num_blocks": 12}
        (path,) = evaluate(checkpoint, source, cpu, {rows: None}, out_dir=tmp_path, **settings)
        result = results.read(path)
        assert result.meta["rows"] == rows
        hashes.add(result.entries["UNION", 24]["rows_sha256"])
    assert len(hashes) == 3


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test as soon as a layer is read: bad input is to be found before."""
    monkeypatch.setattr(Weights, "_read", lambda *a: pytest.fail("weights were read"))
    monkeypatch.setattr(forward, "Traversal", lambda *a: pytest.fail("a pass was started"))


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"only": ["UNION", "pack_z"]}, PackError, ["'pack_z'", "pack_a", "UNION"]),
        ({"num_blocks": 4000}, PackError, ["4000 were asked for", "UNION"]),
        ({"seq_lens": [24, 2048]}, ParameterError, ["seq_lens", "2048", "1024"]),
        ({"seq_lens": [1]}, ParameterError, ["seq_lens", "found 1"]),
        ({"rows": "test"}, PackError, ["rows", "'test'"]),
        ({"entropy_topk": 600}, EaftError, ["entropy_topk", "600", "512"]),
    ],
)
def test_bad_input_is_found_before_any_weight_is_read(
    checkpoint, source, cpu, tmp_path, no_weights, change, error, words
):
    with pytest.raises(error) as raised:
        evaluate(checkpoint, source, cpu, {"x": None}, out_dir=tmp_path / "out", **(SETTINGS | change))
    assert all(word in str(raised.value) for word in words)
    assert not (tmp_path / "out").exists()


def test_a_pack_without_an_assistant_is_found_before_any_weight_is_read(checkpoint, cpu, tmp_path, no_weights):
    world.write_pack(tmp_path / "packs" / "mute.parquet", ["<|start|>user<|message|>" + "hello " * 200 + "<|end|>"])
    with pytest.raises(PackError, match=r"pack mute .* no row has an assistant message"):
        evaluate(
            checkpoint, evaluation.PackSource(str(tmp_path / "packs")), cpu, {"x": None},
            out_dir=tmp_path / "out", **(SETTINGS | {"only": None}),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_pass_that_fails_leaves_the_finished_passes_whole(checkpoint, source, cpu, tmp_path, monkeypatch):
    score, calls = forward.score, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return score(*args, **kwargs)

    monkeypatch.setattr(forward, "score", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(checkpoint, source, cpu, {"x": None}, out_dir=tmp_path / "out", **SETTINGS)
    kept = results.read(tmp_path / "out" / "x.json")
    assert len(kept.entries) == 2 and all(kept.tokens(*key) is not None for key in kept.entries)


@pytest.fixture
def passes(monkeypatch):
    """The (pack, seq_len) of every pass that is made; one in ``passes.fatal`` fails."""
    score, made = forward.score, type("Passes", (list,), {"fatal": None})()

    def counted(checkpoint, blocks, *args, **kwargs):
        made.append((blocks.pack, blocks.seq_len))
        if made[-1] == made.fatal:
            raise RuntimeError("out of memory")
        return score(checkpoint, blocks, *args, **kwargs)

    monkeypatch.setattr(forward, "score", counted)
    return made


def numbers(path):
    """Everything in a result but speed and what depends on the file itself."""
    content = json.loads(path.read_text())
    del content["meta"]["tokens_sha256"]
    for pack in content["packs"]:
        for entry in pack["seq"].values():
            del entry["model"]["tok_s_pred"]
    return content


def test_a_run_goes_on_where_it_was_stopped(checkpoint, source, cpu, keep, folder, tmp_path, passes):
    models = {"base": None, "half": keep}
    passes.fatal = ("pack_a", 24)
    with pytest.raises(RuntimeError):
        evaluate(checkpoint, source, cpu, models, out_dir=tmp_path, **SETTINGS)
    assert passes == [("UNION", 24), ("UNION", 40), ("pack_a", 24)]
    passes.clear(), setattr(passes, "fatal", None)
    evaluate(checkpoint, source, cpu, models, out_dir=tmp_path, **SETTINGS)
    assert passes == [("pack_a", 24), ("pack_a", 40)]
    for label in models:
        assert numbers(tmp_path / f"{label}.json") == numbers(folder / f"{label}.json")
        assert results.read(tmp_path / f"{label}.json").tokens("UNION", 24) is not None


def test_a_rerun_that_crashes_early_loses_nothing(checkpoint, source, cpu, tmp_path, passes):
    evaluate(checkpoint, source, cpu, {"x": None}, out_dir=tmp_path, **SETTINGS)
    before = numbers(tmp_path / "x.json")
    passes.fatal = ("pack_b", 24)
    with pytest.raises(RuntimeError):
        evaluate(checkpoint, source, cpu, {"x": None}, out_dir=tmp_path, **(SETTINGS | {"only": ["pack_b", "UNION"]}))
    assert numbers(tmp_path / "x.json") == before


def test_a_stop_between_the_two_files_loses_only_the_last_pass(checkpoint, source, cpu, tmp_path, passes):
    """New tokens, old JSON: what a kill leaves at the worst moment."""
    one = SETTINGS | {"only": ["UNION"]}
    evaluate(checkpoint, source, cpu, {"x": None}, out_dir=tmp_path, **one)
    old = (tmp_path / "x.json").read_bytes()
    evaluate(checkpoint, source, cpu, {"x": None}, out_dir=tmp_path, **SETTINGS)
    (tmp_path / "x.json").write_bytes(old)
    passes.clear()
    evaluate(checkpoint, source, cpu, {"x": None}, out_dir=tmp_path, **SETTINGS)
    assert passes == [("pack_a", 24), ("pack_a", 40)]
    assert len(results.read(tmp_path / "x.json").entries) == 4


@pytest.mark.parametrize("damage", ["json", "tokens", "rows"])
def test_numbers_that_do_not_follow_from_the_tokens_are_scored_again(checkpoint, source, cpu, tmp_path, passes, damage):
    one = SETTINGS | {"only": ["UNION"], "seq_lens": [24]}
    (path,) = evaluate(checkpoint, source, cpu, {"x": None}, out_dir=tmp_path, **one)
    good = numbers(path)
    content = json.loads(path.read_text())
    entry = content["packs"][0]["seq"]["24"]
    if damage == "json":
        entry["model"]["var_nll"] += 1e-6
    elif damage == "rows":
        entry["rows_sha256"] = "of other rows"
    else:
        results.tokens_path(path).unlink()
    path.write_text(json.dumps(content))
    passes.clear()
    evaluate(checkpoint, source, cpu, {"x": None}, out_dir=tmp_path, **one)
    assert passes == [("UNION", 24)] and numbers(path) == good


@pytest.mark.parametrize(
    "change",
    [
        {"num_blocks": 4},
        {"cc_quantile": 0.2},
        {"rows": "calib"},
        {"entropy_topk": 10},
        {"code": "other"},
        {"with": "half"},
    ],
)
def test_another_setting_starts_anew_and_keeps_the_old_files_aside(
    checkpoint, source, cpu, keep, tmp_path, passes, change, monkeypatch
):
    settings = SETTINGS | {"only": ["UNION"], "seq_lens": [24]}
    (path,) = evaluate(checkpoint, source, cpu, {"x": None}, out_dir=tmp_path, **settings)
    old = path.read_bytes(), results.tokens_path(path).read_bytes()
    models = {"x": None}
    if "code" in change:
        monkeypatch.setattr(evaluation.project, "code_sha256", lambda: "other")
    elif "with" in change:
        models["half"] = keep  # base then stands in one pass with a candidate
    else:
        settings |= change
    passes.clear()
    evaluate(checkpoint, source, cpu, models, out_dir=tmp_path, **settings)
    assert passes == [("UNION", 24)]
    assert old == tuple((tmp_path / name).read_bytes() for name in ("x.json.old", "x.tokens.parquet.old"))
    assert [r.label for r in results.read_all([str(tmp_path)])] == sorted(models)


def test_another_length_joins_the_result(checkpoint, source, cpu, tmp_path, passes):
    for length in (24, 40):
        settings = SETTINGS | {"only": ["UNION"], "seq_lens": [length]}
        (path,) = evaluate(checkpoint, source, cpu, {"x": None}, out_dir=tmp_path, **settings)
    assert passes == [("UNION", 24), ("UNION", 40)]
    assert set(results.read(path).entries) == {("UNION", 24), ("UNION", 40)}
    assert results.read(path).meta["seq_lens"] == [24, 40]


def test_a_label_does_not_replace_another_models_result(checkpoint, source, cpu, tmp_path, no_weights):
    write(tmp_path, "x", {("UNION", 24): random_tokens()}, {"eos_token_id": 1, "model_sha256": "0" * 64})
    with pytest.raises(EaftError, match=r"x\.json is the result of another model: model_sha256 is 0+ against"):
        evaluate(checkpoint, source, cpu, {"x": None}, out_dir=tmp_path, **SETTINGS)


@pytest.mark.parametrize("label", ["../escaped", "a/b", ""])
def test_a_label_that_is_no_file_name_is_refused(checkpoint, source, cpu, tmp_path, label):
    settings = SETTINGS | {"only": ["UNION"], "seq_lens": [24]}
    with pytest.raises(EaftError, match="label"):
        evaluate(checkpoint, source, cpu, {label: None}, out_dir=tmp_path / "out" / "in", **settings)
    assert list(tmp_path.rglob("*.json")) == []


def test_a_pruned_checkpoint_says_how_it_was_chosen(checkpoint, source, cpu, keep, tmp_path):
    prune(checkpoint, keep, tmp_path / "pruned", progress=False)
    settings = SETTINGS | {"only": ["UNION"], "seq_lens": [24]}
    (path,) = evaluate(Checkpoint(str(tmp_path / "pruned")), source, cpu, {"p": None}, out_dir=tmp_path, **settings)
    meta = results.read(path).meta
    assert meta["keep_set"] == keep.chosen_by and meta["num_experts"] == 4 and meta["recovered"] is None


RECOVERED = {
    "trained": ["routers", "norms"], "attention_rank": None, "parameters": 3970, "parameters_share": 0.036, "steps": 600,
    "best_step": 550, "tokens": 19660800, "text": {"pack": "UNION", "rows": "calib"}, "init": None,
}  # fmt: skip


def test_a_recovered_checkpoint_says_what_was_trained(checkpoint, source, cpu, keep, tmp_path):
    """As its manifest does; a result of the same weights before it was trained is another model's."""
    pruned, settings = tmp_path / "pruned", SETTINGS | {"only": ["UNION"], "seq_lens": [24]}
    manifest = prune(checkpoint, keep, pruned, progress=False)
    evaluate(Checkpoint(str(pruned)), source, cpu, {"x": None}, out_dir=tmp_path, **settings)
    (pruned / "prune_manifest.json").write_text(json.dumps(manifest | {"recovered": RECOVERED}))
    there = Checkpoint(str(pruned))
    (path,) = evaluate(there, source, cpu, {"p": None}, out_dir=tmp_path, **settings)
    assert results.read(path).meta["recovered"] == RECOVERED and results.read(path).meta["keep_set"] == keep.chosen_by
    with pytest.raises(
        EaftError, match=r"x\.json is the result of another model: recovered is None against \{'trained'"
    ):
        evaluate(there, source, cpu, {"x": None}, out_dir=tmp_path, **settings)


def test_neither_the_whole_model_nor_a_keep_set_of_it_is_recovered(folder):
    assert [results.read(folder / f"{label}.json").meta["recovered"] for label in ("base", "half")] == [None, None]
