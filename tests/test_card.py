"""Model cards: what they say is what manifest and results say; what others may have named stays text."""

import json
import re
import shutil

import numpy as np
import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from eaftlib.__main__ import main
from eaftlib.errors import EaftError
from eaftlib.evaluation import gates, results
from eaftlib.evaluation.evaluate import evaluate
from eaftlib.model.checkpoint import Checkpoint
from eaftlib.pruning.keepsets import KeepSet
from eaftlib.pruning.slicing import prune
from eaftlib.publish import verified_files
from eaftlib.report import card
from eaftlib.report.markdown import plain

APACHE = "\n                                 Apache License\n                           Version 2.0, January 2004\n"
HOSTILE = "x|y`<script>alert(1)</script>\n# [l](http://e) **b** &amp; ![i](http://e/i.png) https://e www.e.com"
INIT = {"trained": ["norms"], "parameters_share": 0.004, "tokens": 900, "text": {"rows": "all", "packs": "more"}}
RECOVERED = {
    "trained": ["routers", "expert_biases"], "parameters_share": 0.0321, "tokens": 2_500_000,
    "text": {"rows": "calib", "packs": "owner/packs"}, "init": INIT,
}  # fmt: skip


def gates_of(**limits):
    wide = {"ppl_absolute": 1e9, "ppl_relative": 1e9, "cc_rate": 1.0, "mean_prob": 1.0, "js2d": 1.0} | limits
    content = {"schema": "eaft-gates/1", "name": "near", "primary_pack": "UNION", "primary_seq_lens": [24, 40]}
    return content | {"limits": wide}


@pytest.fixture(scope="module")
def made(tmp_path_factory, checkpoint, source, cpu):
    """The tiny model with 4 of 8 experts, recovered as its manifest has it, and results of both."""
    folder = tmp_path_factory.mktemp("card")
    ids = np.tile(np.arange(0, checkpoint.num_experts, 2), (checkpoint.num_layers, 1))
    keep = KeepSet(ids, checkpoint.num_experts, {"criterion": "reap_mass", "keep_n": 4, "ranking_rows": "calib"})
    prune(checkpoint, keep, folder / "pruned", progress=False)
    prune(checkpoint, keep, folder / "recovered", recovered=RECOVERED, progress=False)
    settings = {"seq_lens": [24, 40], "num_blocks": 14, "only": ["UNION"], "rows": "eval", "progress": False}
    for model, label in ((checkpoint, "base"), *((Checkpoint(str(folder / n)), n) for n in ("pruned", "recovered"))):
        evaluate(model, source, cpu, {label: None}, out_dir=folder / "results", **settings)
    return folder


@pytest.fixture
def work(made, tmp_path):
    return shutil.copytree(made, tmp_path / "work")


def write(work, name="pruned", **limits):
    """The card that the command writes."""
    (work / "gates.json").write_text(json.dumps(gates_of(**limits)))
    scored = ["--result", work / "results" / f"{name}.json", "--baseline", work / "results" / "base.json"]
    assert main([str(w) for w in ("card", work / name, *scored, "--gates", work / "gates.json")]) == 0
    return (work / name / "README.md").read_text()


def built(work, name="pruned"):
    scored = (results.read(work / "results" / f"{label}.json") for label in (name, "base"))
    (work / "gates.json").write_text(json.dumps(gates_of()))
    return card.build(Checkpoint(str(work / name)), *scored, gates.read_gates(work / "gates.json"))


def change_manifest(work, change, name="pruned"):
    path = work / name / "prune_manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def table_cells(text):
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if line[:1] == "|"]


def test_the_verdict_comes_first_and_a_fail_is_said_plainly(work):
    passed, failed = write(work), write(work, mean_prob=0.0)
    for text, status in ((passed, "PASS"), (failed, "FAIL")):
        body = text.split("---\n", 2)[2].strip().splitlines()
        assert body[0] == "# pruned: 4 of 8 experts per layer" and body[2].startswith(f"**near: {status}**")
    assert "not near-lossless" in failed and "not near-lossless" not in passed


def test_differences_are_those_of_the_result_files(work):
    text = write(work, mean_prob=0.0)
    base, pruned = (
        json.loads((work / "results" / f"{n}.json").read_text())["packs"][0]["seq"] for n in ("base", "pruned")
    )
    rows = [cells for cells in table_cells(text) if cells[0] in ("dPPL", "d mean p")]
    for (ppl, mean_prob), length in zip((rows[:2], rows[2:]), ("24", "40"), strict=True):
        a, b = base[length]["model"], pruned[length]["model"]
        assert ppl[1] == f"{b['ppl'] - a['ppl']:+.3f}"
        assert mean_prob[1] == f"{b['mean_prob'] - a['mean_prob']:+.4f}" and mean_prob[3:5] == ["0.0000", "FAIL"]
        low, high = map(float, ppl[2].split(" to "))
        assert low < float(ppl[1]) < high
        assert f"Perplexity {b['ppl']:.3f}, before {a['ppl']:.3f}; {b['kept_tokens']} tokens scored in" in text


def test_rows_training_and_size_are_those_of_the_manifest(work):
    text = write(work, "recovered")
    cells = table_cells(text)
    assert ["chose the experts", "calib", "criterion reap\\_mass"] in cells
    assert ["trained it", "calib", "owner/packs"] in cells and ["trained it, before that", "all", "more"] in cells
    assert any(row[:2] == ["judged it", "eval"] for row in cells)
    assert "Mind: it may have been trained on rows that it is judged on." in text
    assert "routers, expert\\_biases: 3.2% of the whole model's parameters, on 2.5 M tokens" in text
    manifest = json.loads((work / "recovered" / "prune_manifest.json").read_text())
    assert ["bytes of all tensors", f"{manifest['bytes_before']:,}", f"{manifest['bytes_after']:,}"] in cells
    assert "Nothing. Every tensor that was kept" in write(work) and "trained it" not in write(work)


def test_the_hub_reads_the_front_matter(work):
    data = ModelCard(write(work, "recovered")).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert {"expert-pruning", "distillation"} <= set(data.tags) and data.base_model is None

    def from_hub(manifest):
        manifest["source"] |= {"model_id": "openai/gpt-oss-20b", "revision": "a" * 40}

    change_manifest(work, from_hub)
    data = ModelCard(write(work)).data
    assert data.base_model == "openai/gpt-oss-20b" and "distillation" not in data.tags


@pytest.mark.parametrize(
    "files, expected, words",
    [
        ({"LICENSE": APACHE}, "apache-2.0", "apache-2.0, by the source's file LICENSE"),
        ({"LICENSE": "MIT License\n\nCopyright (c) 2020"}, "mit", "mit, by the source's file LICENSE"),
        ({"LICENSE": "You may look at it."}, "other", "other, by the source's file LICENSE"),
        ({"LICENSE": "Not the Apache License"}, "other", "other, by"),
        ({}, "unknown", "Unknown: no licence came with"),
    ],
)
def test_a_licence_is_read_and_never_guessed(work, files, expected, words):
    (work / "pruned" / "LICENSE").unlink()
    for name, text in files.items():
        (work / "pruned" / name).write_text(text)
    text = write(work)
    data = ModelCard(text).data
    assert data.license == expected and words in text
    assert data.to_dict().get("license_link") == ("LICENSE" if expected == "other" else None)


def test_without_a_text_the_sources_own_card_says_the_licence(work, tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "README.md").write_text("---\nlicense: llama3\n---\n# It\n")
    (work / "pruned" / "LICENSE").unlink()
    change_manifest(work, lambda m: m["source"].update(model_id=str(tmp_path / "source")))
    text = write(work)
    assert ModelCard(text).data.license == "llama3" and "llama3, by the source's model card." in text


def test_hostile_names_stay_text(work):
    def spoil(manifest):
        manifest["chosen_by"] |= {"criterion": HOSTILE, "ranking_rows": HOSTILE}
        manifest["source"]["model_id"] = HOSTILE
        manifest["recovered"] = RECOVERED | {"trained": [HOSTILE], "text": {"rows": HOSTILE, "packs": HOSTILE}}

    change_manifest(work, spoil)
    for name in ("pruned", "base"):
        path = work / "results" / f"{name}.json"
        content = json.loads(path.read_text())
        content["meta"] |= {"dataset_repo": HOSTILE, "gpu_name": HOSTILE, "dtype": HOSTILE}
        path.write_text(json.dumps(content))
    text = write(work).split("---\n", 2)[2]
    parsed = MarkdownIt("gfm-like", {"linkify": False, "html": True}).parse(text)
    inner = [token for block in parsed for token in (block, *(block.children or ()))]
    assert not {t.type for t in inner} & {"html_inline", "html_block", "link_open", "image"}
    assert len([t for t in parsed if t.type == "heading_open" and t.tag == "h1"]) == 1
    shown = "".join(t.content for t in inner if t.type in ("text", "text_special"))
    assert shown.count(HOSTILE.replace("\n", " ")) >= 8
    assert not re.search(r"(?<!\\)(https://|www\.)", text.replace("https\\://", "").replace("www\\.", ""))


def test_plain_text_is_left_alone():
    assert plain("eaft-reap 0.5, recon (16): 3") == "eaft-reap 0.5, recon (16): 3"
    assert plain("a_b|c") == "a\\_b\\|c" and plain("a\nb\x00c") == "a b c"


def test_a_card_beside_the_checkpoint_changes_nothing_of_it(work):
    before = Checkpoint(str(work / "pruned")).sha256
    write(work)
    after = Checkpoint(str(work / "pruned"))
    assert after.sha256 == before and "README.md" not in {file.name for file in verified_files(after)}
    assert write(work) == write(work)


def test_the_snippet_reads_the_folder_where_the_name_is_not_known_yet(work):
    assert 'name = "."' in write(work)
    assert 'name = "owner/a_b"' in card.markdown(built(work), "owner/a_b")


def test_results_of_another_model_or_the_same_twice_are_refused(work):
    (work / "gates.json").write_text(json.dumps(gates_of()))
    own, base = (results.read(work / "results" / f"{n}.json") for n in ("pruned", "base"))
    pruned, limits = Checkpoint(str(work / "pruned")), gates.read_gates(work / "gates.json")
    assert card.build(pruned, own, base, limits).label == "pruned"
    for pair in ((base, base), (own, own), (base, own)):
        with pytest.raises(EaftError, match=r"is not a result of"):
            card.build(pruned, *pair, limits)
