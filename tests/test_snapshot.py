"""The quality snapshot: the published tables' layout and rounding, and its four rows at demo scale."""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import world
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from eaftlib import params
from eaftlib.__main__ import main
from eaftlib.engine.placement import place
from eaftlib.errors import ResultError
from eaftlib.evaluation import gates, results
from eaftlib.evaluation.evaluate import evaluate
from eaftlib.model.checkpoint import Checkpoint
from eaftlib.pruning import keepsets
from eaftlib.pruning.criteria import RegionWeights, expert_sums, token_weights
from eaftlib.pruning.ranking import ranking_of, write_ranking
from eaftlib.pruning.trace import record
from eaftlib.report import snapshot
from eaftlib.text.packs import PackSource, pack_blocks

ROOT = Path(__file__).parents[1]
GATES = gates.read_gates(ROOT / "params" / "gates" / "near-lossless-v1.json")
PUBLISHED = ROOT / "params" / "gpt-oss-20b" / "snapshot" / "published.json"
TOKENS = 10_000_000

# Numbers that give the published ones, differences included, when they are rounded: (ppl, CC rate, mean p).
FULL = {
    1024: {
        "base": (5.2370, 0.0006320, 0.47460),
        "HF REAP 0.5": (7.6490, 0.0015900, 0.41580),
        "EAFT\u2011REAP\u201150": (7.2900, 0.0018690, 0.42130),
        "EAFT\u2011REAP\u201125": (18.2720, 0.0051830, 0.30460),
    },
    2048: {
        "base": (4.7163, 0.0011866, 0.48230),
        "HF REAP 0.5": (6.5736, 0.0024113, 0.42850),
        "EAFT\u2011REAP\u201150": (6.3573, 0.0026042, 0.43040),
        "EAFT\u2011REAP\u201125": (15.8593, 0.0063150, 0.31010),
    },
}


def model_entry(ppl, cc_rate, mean_prob):
    """Aggregates of a model whose conflicts lie in the first cell of (p, H), under thresholds at that cell's edges.

    All other tokens lie in the cell of their means.
    """
    conflicts = round(cc_rate * TOKENS)
    counts = [0] * (160 * 120)
    others = mean_prob * TOKENS / (TOKENS - conflicts)
    counts[0], counts[int(others * 160) * 120 + 48] = conflicts, TOKENS - conflicts
    edges = {"x_edges": list(np.linspace(0, 1, 161)), "y_edges": list(np.linspace(0, 1, 121))}
    return {
        "ppl": ppl,
        "mean_nll": float(np.log(ppl)),
        "mean_prob": mean_prob,
        "mean_entropy": 0.4,
        "kept_tokens": TOKENS,
        "p_thr": 1 / 160,
        "h_thr": 1 / 120,
        "cc_rate": conflicts / TOKENS,
        "cc_count": conflicts,
        "hist2d_x_H": edges | {"counts": counts, "xbins": 160, "ybins": 120},
    }


def write(folder, full, rename=lambda label: label):
    """A result JSON, without tokens, of each model at the lengths where ``full`` has it; their paths, in order."""
    labels = list(dict.fromkeys(label for models in full.values() for label in models))
    paths = [folder / f"{i}.json" for i in range(len(labels))]
    for path, label in zip(paths, labels, strict=True):
        seq = {str(n): {"rows_seen": 9, "model": model_entry(*full[n][label])} for n in full if label in full[n]}
        meta = {"label": rename(label), "model_id": f"models/{label}", "rows": "all", "num_blocks": 512}
        path.write_text(json.dumps({"meta": meta, "packs": [{"pack": "UNION", "seq": seq}]}))
    return [str(path) for path in paths]


def rows_of(text):
    return [line for line in text.splitlines() if line.startswith("|")]


def test_the_published_tables_come_out_byte_for_byte(tmp_path):
    paths = write(tmp_path, FULL)
    out = tmp_path / "snapshot.md"
    gates_file = str(ROOT / "params" / "gates" / "near-lossless-v1.json")
    assert main(["snapshot", *paths, "--baseline", "base", "--gates", gates_file, "--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    golden = (ROOT / "tests" / "golden" / "snapshot" / "tables.txt").read_text(encoding="utf-8")
    assert "\n".join(rows_of(text)) + "\n" == golden
    before, after = text.split("### Seq len 2048")
    assert "## Results (UNION)" in before and len(rows_of(before)) == len(rows_of(after)) == 6


def test_published_figures_stand_beside_ours_under_equal_labels(tmp_path):
    full = {n: dict(models) | {"mine": (5.0, 0.001, 0.5)} for n, models in FULL.items()}
    full[1024]["base"] = (5.5, 0.0007, 0.46)
    found = results.read_all(write(tmp_path, full, lambda label: label.replace("\u2011", "-").replace(" ", "-")))
    text = snapshot.markdown(found, "base", GATES, snapshot.read_published(PUBLISHED))
    tables = rows_of(text)[7 + 7 :]
    assert tables[2] == (
        "| base | 5.500 | 5.237 | 0.000 | 0.000 | +0.000000 | +0.000000 | +0.0000 | +0.0000 "
        "| PASS (baseline) | PASS (baseline) |"
    )
    assert tables[3].startswith("| HF-REAP-0.5 | 7.649 | 7.649 | +2.149 | +2.412 | +0.000890 | +0.000958 |")
    assert len(tables) == 2 * (2 + 4) and not any("mine" in row for row in tables)


def test_the_stored_figures_are_those_of_the_golden_tables():
    golden = (ROOT / "tests" / "golden" / "snapshot" / "tables.txt").read_text(encoding="utf-8").splitlines()
    stored = snapshot.read_published(PUBLISHED).scores
    for length, lines in ((1024, golden[2:6]), (2048, golden[8:12])):
        cells = [line.strip("| ").split(" | ") for line in lines]
        found = {
            label: [s.ppl, s.dppl, s.cc_rate, s.dcc, s.mean_prob, s.dmean_prob, s.gate]
            for label, s in stored[length].items()
        }
        for label, *numbers, gate in cells:
            assert found[label.replace("\u2011", "-").replace(" ", "-")] == [*map(float, numbers), gate]


def test_a_length_that_was_not_scored_is_a_gap(tmp_path):
    full = {1024: {"base": (5.0, 0.001, 0.5), "near": (5.1, 0.001, 0.5)}, 2048: {"base": (4.0, 0.001, 0.5)}}
    text = snapshot.markdown(results.read_all(write(tmp_path, full)), "base", GATES)
    assert rows_of(text)[3] == "| near | 5.100 | +0.100 | 0.001000 | +0.000000 | 0.5000 | +0.0000 | PASS |"
    assert rows_of(text)[7] == "| near |  |  |  |  |  |  | not scored |"


def test_a_baseline_that_is_not_there_or_lacks_a_length_is_named(tmp_path):
    found = results.read_all(write(tmp_path, {1024: FULL[1024]}))
    with pytest.raises(ResultError, match=r"no result is labelled 'whole'; there are \['EAFT"):
        snapshot.markdown(found, "whole", GATES)
    with pytest.raises(ResultError, match=r"0\.json has no UNION at \[2048\]"):
        snapshot.markdown(found, "base", GATES)


def test_a_label_cannot_break_the_table(tmp_path):
    hostile = "a|b`<script>alert(1)</script>\n| x | [l](http://e)"
    found = results.read_all(write(tmp_path, FULL, lambda label: hostile if label.startswith("HF") else label))
    text = snapshot.markdown(found, "base", GATES)
    assert (
        len(rows_of(text)) == 12
        and "<script" not in text.replace("\\<script", "")
        and "](" not in text.replace("\\]", "")
    )


# four rows, small


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder to run the demo's parameters in."""
    folder = tmp_path_factory.mktemp("snapshot")
    for name in ("demo", "params", "notebooks"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="module")
def others(workplace):
    """What another tool may leave of the demo model: every other expert, no manifest, once as stored and once decoded."""
    source = ROOT / "demo" / "model"
    state = {k: v for file in sorted(source.glob("*.safetensors")) for k, v in load_file(file).items()}
    of_experts = {k for k in state if ".mlp.router." in k or ".mlp.experts." in k}
    sliced = {k: v[::2].contiguous() if k in of_experts else v for k, v in state.items()}
    decoded = {k: v for k, v in sliced.items() if not k.endswith(("_blocks", "_scales"))}
    for name in sliced:
        if name.endswith("_blocks"):
            plain = name.removesuffix("_blocks")
            decoded[plain] = decode(sliced[name].numpy(), sliced[f"{plain}_scales"].numpy())
    config = world.read_config(source) | {"num_local_experts": 16}
    unquantised = {k: v for k, v in config.items() if k != "quantization_config"}
    for kind, tensors, settings in (("mxfp4", sliced, config), ("bf16", decoded, unquantised)):
        folder = workplace / "outputs" / "demo" / f"other-{kind}"
        folder.mkdir(parents=True)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(settings))
        for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copy(source / file, folder)
    return workplace / "outputs" / "demo"


def decode(blocks, scales):
    """MXFP4 [E, out, groups, 16] to bfloat16 as transformers stores plain experts, [E, in, out]; nothing is lost."""
    values = world.E2M1[np.stack([blocks & 15, blocks >> 4], -1)].reshape(*scales.shape, 32)
    values = values * np.exp2(scales.astype(np.float32) - 127)[..., None]
    exact = torch.from_numpy(values.reshape(*scales.shape[:2], -1)).transpose(1, 2).contiguous()
    assert torch.equal(exact.bfloat16().float(), exact)
    return exact.bfloat16()


def parameters(name, notebook):
    return params.of_notebook(notebook, yaml.safe_load((ROOT / "params" / "demo" / "snapshot" / name).read_text()))


def rank():
    p = parameters("rank.yaml", "01_rank")
    checkpoint, source = Checkpoint(p.model), PackSource(p.packs, p.pack_files)
    blocks = pack_blocks(
        source,
        "UNION",
        checkpoint.tokenizer,
        checkpoint.family.completion_spans,
        seq_len=p.seq_len,
        num_blocks=p.num_blocks,
        rows=p.rows,
    )
    settings = {"entropy_topk": p.entropy_topk, "recon_tokens": 0, "out_dir": Path(p.out_dir)}
    trace, _ = record(checkpoint, blocks, place("cpu", "float32"), **settings)
    weight = token_weights(trace, p.cc_quantile, RegionWeights(p.w_good, p.w_uncertain, p.w_conflict))
    sums = expert_sums(trace, weight, p.align)
    said = p.model_dump(include={"packs", "pack_files", "cc_quantile", "w_good", "w_uncertain", "w_conflict", "align"})
    write_ranking(Path(p.out_dir), ranking_of(trace, sums, p.criteria, settings=said, seed=p.seed), sums)


def score(name):
    p = parameters(name, "03_evaluate")
    checkpoint = Checkpoint(p.model)
    keep_sets = {label: how and keepsets.from_ranking(checkpoint, **how) for label, how in p.keep_sets.items()}
    where = PackSource(p.packs, p.pack_files), place("cpu", "float32")
    settings = {"seq_lens": p.seq_lens, "num_blocks": p.blocks_by_length, "only": p.only, "rows": p.rows}
    (written,) = evaluate(checkpoint, *where, keep_sets, **settings, out_dir=Path(p.out_dir), progress=False)
    return written


@pytest.fixture(scope="module")
def written(workplace, others):
    """What the documented sequence of commands leaves, of the demo's parameters."""
    with contextlib.chdir(workplace):
        rank()
        order = ["base", "other-mxfp4", "other-bf16", "eaft-reap-16", "eaft-reap-8"]
        paths = [str(score(f"eval-{name}.yaml").resolve()) for name in order]
        assert main(["snapshot", *paths, "--out", "outputs/demo/snapshot.md"]) == 0
        found = [results.read(path) for path in paths]
        return (workplace / "outputs/demo/snapshot.md").read_text(encoding="utf-8"), found


def test_four_rows_at_demo_scale(written):
    text, found = written
    tables = rows_of(text)
    assert len(tables) == 2 * (2 + 5)
    for length, rows in ((1024, tables[2:7]), (2048, tables[9:14])):
        models = [r.entries["UNION", length]["model"] for r in found]
        for row, result, model in zip(rows, found, models, strict=True):
            label, ppl, dppl, *_, mean_prob, dmean_prob, gate = row.strip("| ").split(" | ")
            assert label.replace("\\", "") == result.label
            assert (ppl, mean_prob) == (f"{model['ppl']:.3f}", f"{model['mean_prob']:.4f}")
            assert float(dppl) == pytest.approx(model["ppl"] - models[0]["ppl"], abs=6e-4)
            assert float(dmean_prob) == pytest.approx(model["mean_prob"] - models[0]["mean_prob"], abs=6e-5)
            assert gate == ("PASS (baseline)" if result is found[0] else "FAIL")
        base, mxfp4, bf16, half, quarter = (model["ppl"] for model in models)
        assert mxfp4 == bf16 and base < half < quarter
    assert "other-bf16: outputs/demo/other-bf16, 16 experts a layer, scored in float32" in text
    assert "eaft-reap-8: demo/model, 8 experts a layer, chosen by eaft\\_reap on rows: all" in text


@pytest.mark.parametrize("kind", ["mxfp4", "bf16"])
def test_another_tools_checkpoint_scores_what_transformers_says(others, written, kind):
    model = world.load_with_transformers(AutoModelForCausalLM, others / f"other-{kind}")
    checkpoint = Checkpoint(str(others / f"other-{kind}"))
    spans = checkpoint.family.completion_spans
    packs = PackSource(str(ROOT / "demo" / "packs"))
    blocks = pack_blocks(packs, "UNION", checkpoint.tokenizer, spans, seq_len=1024, num_blocks=1)
    tokens, kept = blocks.tokens[0], torch.from_numpy(blocks.kept[0, 1:])
    predicted = world.logits(model, tokens[None])[0, :-1].log_softmax(-1)
    expected = -predicted.gather(1, torch.from_numpy(tokens[1:]).long()[:, None])[:, 0][kept]
    result = next(r for r in written[1] if r.label == f"other-{kind}")
    assert result.meta["num_experts"] == 16 and result.meta["keep_set"] is None
    found = result.tokens("UNION", 1024)
    np.testing.assert_allclose(found.nll[found.block == 0], expected.numpy(), rtol=1e-3, atol=1e-4)


def test_the_snapshots_parameters_are_no_part_of_the_others():
    """A pattern that names the evaluations of a model must not queue the snapshot's too."""
    names = {file.name for file in (ROOT / "params" / "gpt-oss-20b").glob("eval-*.yaml")}
    assert names == {"eval-base-1024.yaml", "eval-base-2048.yaml", "eval-recovered-16.yaml"}
    files = sorted((ROOT / "params" / "gpt-oss-20b" / "snapshot").glob("eval-*.yaml"))
    said = [params.of_notebook("03_evaluate", yaml.safe_load(file.read_text())) for file in files]
    assert {label for p in said for label in p.keep_sets} == set(snapshot.read_published(PUBLISHED).scores[1024])
    assert len({(p.rows, p.packs, str(p.blocks_by_length), str(p.only), p.out_dir) for p in said}) == 1
    kept = {label: keep and keep["keep_n"] for p in said for label, keep in p.keep_sets.items()}
    assert kept == {"base": None, "HF-REAP-0.5": None, "EAFT-REAP-50": 16, "EAFT-REAP-25": 8}
