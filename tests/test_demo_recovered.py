"""The tensors in demo/recovered are what its files of parameters trained, and they win most of the loss back."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from eaftlib import params
from eaftlib.engine import forward
from eaftlib.engine.placement import place
from eaftlib.engine.weights import Weights
from eaftlib.model.checkpoint import Checkpoint
from eaftlib.pruning import keepsets, slicing
from eaftlib.recovery.loop import Objective, Schedule
from eaftlib.recovery.recover import recover, training_folder
from eaftlib.text.packs import UNION, PackSource, pack_blocks

ROOT = Path(__file__).parents[1]
RECOVERED = ROOT / "demo" / "recovered"


@pytest.fixture(scope="module")
def demo():
    return Checkpoint(str(ROOT / "demo" / "model"))


def packed(demo, rows, num_blocks):
    source, spans = PackSource(str(ROOT / "demo" / "packs")), demo.family.completion_spans
    return pack_blocks(source, UNION, demo.tokenizer, spans, seq_len=1024, num_blocks=num_blocks, rows=rows)


def parameters(name):
    return params.of_notebook("05_recover", params.read_file(ROOT / "params" / "demo" / name))


def perplexity(run):
    return float(np.exp(run.nll.mean(dtype=np.float64)))


@pytest.mark.parametrize("kept, share", [(16, 0.0320), (12, 0.0790)])
def test_recovered_tensors_give_most_of_the_loss_back(demo, tmp_path, kept, share):
    """A third of what the untrained prune lost is left, and no expert matrix is touched."""
    p = parameters(f"recover-{kept}.yaml")
    assert p.steps == 0 and p.keep_n == kept
    keep = keepsets.from_ranking(demo, **(p.keep_set | {"ranking": str(ROOT / p.ranking)}))
    manifest = recover(
        demo, keep, packed(demo, "calib", p.num_blocks), place("cpu"),
        parts=p.trained, attention_rank=None, held_out_blocks=p.held_out_blocks,
        schedule=Schedule(0, p.batch_blocks, p.learning_rate, p.check_every, p.patience), objective=Objective(),
        settings=p.settings, init=ROOT / p.init, out_dir=tmp_path / "model",
    )  # fmt: skip
    assert manifest["recovered"]["parameters_share"] == pytest.approx(share, abs=5e-5)
    assert manifest["recovered"]["tokens"] == manifest["recovered"]["init"]["tokens"] == 63_897_600
    assert json.loads((training_folder(tmp_path / "model") / "recovery.json").read_text())["best_step"] == 0

    slicing.prune(demo, keep, tmp_path / "pruned", progress=False)
    recovered, pruned = Checkpoint(str(tmp_path / "model")), Checkpoint(str(tmp_path / "pruned"))
    matrices = [name for name in pruned.names if name.endswith(("_blocks", "_scales"))]
    assert len(matrices) == 4 * demo.num_layers
    assert all(torch.equal(recovered.tensor(name), pruned.tensor(name)) for name in matrices)

    text = packed(demo, "eval", 12)
    whole, untrained = forward.score(
        Weights(demo, place("cpu")), text, keep_sets=[None, keep.mask], progress=False
    ).variants
    student = forward.score(Weights(recovered, place("cpu")), text, progress=False).variants[0]
    lost, left = (perplexity(x) - perplexity(whole) for x in (untrained, student))
    assert lost > 0.2 and left < 0.45 * lost
    assert left < 0.13


@pytest.mark.parametrize("kept", [16, 12])
def test_their_record_names_the_files_of_parameters(demo, kept):
    record, asked = json.loads((RECOVERED / f"{kept}.json").read_text()), parameters(f"recover-{kept}-long.yaml")
    assert record["settings"] == asked.settings and record["model_sha256"] == demo.sha256
    losses = [look["held_out_kl"] for look in record["curve"]]
    assert record["best_step"] == record["curve"][int(np.argmin(losses))]["step"] == asked.steps


def test_the_ranking_beside_them_is_what_its_file_of_parameters_gives(demo):
    """All that went in is the same; the model, its tokenizer, the rows."""
    asked = params.of_notebook("01_rank", params.read_file(ROOT / "params" / "demo" / "rank.yaml"))
    ranking = json.loads((RECOVERED / "ranking.json").read_text())
    provenance = ranking["provenance"]
    assert provenance["model_sha256"] == demo.sha256 and provenance["tokenizer_sha256"] == demo.tokenizer_sha256
    for name in ("rows", "seq_len", "num_blocks", "packs", "seed", "recon_tokens"):
        assert provenance[name] == getattr(asked, name), name
    assert list(ranking["criteria"]) == asked.criteria
