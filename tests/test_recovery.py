"""Recovery: the loss is distillation's, what is trained is what is written, and a killed run ends as one that was not."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import world
from safetensors import safe_open
from test_ranks import environment
from transformers import AutoModelForCausalLM

from eaftlib.engine import forward, weights
from eaftlib.engine.variants import Variant
from eaftlib.engine.weights import Weights
from eaftlib.errors import CheckpointError, ParameterError, ResultError
from eaftlib.kernels import token_statistics
from eaftlib.kernels.distillation import distillation
from eaftlib.model.checkpoint import Checkpoint
from eaftlib.pruning import slicing
from eaftlib.pruning.criteria import region_bounds
from eaftlib.pruning.keepsets import KeepSet
from eaftlib.recovery.loop import Objective, Schedule, hold_back
from eaftlib.recovery.loss import Distillation, Regions
from eaftlib.recovery.recover import recover, training_folder
from eaftlib.recovery.trained import Trained
from eaftlib.text.packs import Blocks, pack_blocks

EVERYTHING_SMALL = ["routers", "expert_biases", "norms", "attention"]
SCHEDULE = Schedule(steps=6, batch_blocks=2, learning_rate=2e-3, check_every=2, patience=9)


@pytest.fixture(scope="module")
def keep():
    rng = np.random.default_rng(3)
    ids = np.stack([np.sort(rng.permutation(world.EXPERTS)[:4]) for _ in range(world.LAYERS)])
    return KeepSet(ids, world.EXPERTS, {"criterion": "chosen", "keep_n": 4})


@pytest.fixture(scope="module")
def text(source, tokenizer, checkpoint):
    return pack_blocks(source, "UNION", tokenizer, checkpoint.family.completion_spans, seq_len=40, num_blocks=12)


def run(checkpoint, keep, text, placement, out_dir, parts=EVERYTHING_SMALL, rank=None, schedule=SCHEDULE, **more):
    objective = more.pop("objective", Objective())
    settings = {"trained": list(parts), "attention_rank": rank, "init": None, "packs": "packs", "pack_files": None}
    settings |= {"seq_len": 40, "num_blocks": 12, "held_out_blocks": 4, "seed": schedule.seed} | vars(schedule)
    return recover(
        checkpoint, keep, text, placement, parts=parts, attention_rank=rank, held_out_blocks=4, schedule=schedule,
        objective=objective, settings=settings, out_dir=out_dir, **more,
    )  # fmt: skip


def tensors(folder):
    opened = Checkpoint(str(folder))
    return {name: opened.tensor(name) for name in opened.names}


def record(out_dir):
    return json.loads((training_folder(out_dir) / "recovery.json").read_text())


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.fixture(scope="module")
def recovered(checkpoint, keep, text, cpu, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("recovered") / "model"
    run(checkpoint, keep, text, cpu, out_dir)
    return out_dir


# The loss


def test_divergence_and_its_gradient_are_pytorchs():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(7, 50, generator=generator) for _ in range(2))
    leaf = student.clone().requires_grad_()
    expected = F.kl_div(leaf.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    kl, found = distillation(student, teacher)
    torch.testing.assert_close(kl, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("by_region", [False, True])
def test_loss_is_the_weighted_mean_over_all_logits(checkpoint, cpu, text, monkeypatch, by_region):
    """Written with all logits at once, for random hidden states, heads of two models, and slices of a few tokens."""
    monkeypatch.setitem(token_statistics.SLICE_BYTES, "cpu", 14 * 4 * world.VOCAB)
    opened, generator = Weights(checkpoint, cpu, training=True), torch.Generator().manual_seed(0)
    head = (opened.lm_head + 0.1 * torch.randn(opened.lm_head.shape, generator=generator)).requires_grad_()
    teacher, student = Variant(opened), Variant(opened, changed={"lm_head.weight": head})
    regions = Regions(0.02, 0.9, 1.0, 0.5, 0.0, 20) if by_region else None
    hidden = [torch.randn(*text.tokens.shape, world.HIDDEN, generator=generator).requires_grad_() for _ in range(2)]
    loss = Distillation(opened, teacher, student, 0.25, regions).on(text)
    parts = [torch.arange(5), torch.arange(5, len(text.tokens))]
    found = sum(loss(ids, [h[ids] for h in hidden]) for ids in parts)

    kept, targets = torch.from_numpy(text.kept)[:, 1:], torch.from_numpy(text.tokens)[:, 1:].long()
    z_teacher, z_student = (hidden[0] @ opened.lm_head.T)[:, :-1].detach(), (hidden[1] @ head.T)[:, :-1]
    kl = F.kl_div(z_student.log_softmax(-1), z_teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    base = torch.where(kept, 1.0, 0.25)
    weight = base
    if by_region:
        p = z_teacher.softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
        top = z_teacher.topk(20).values.softmax(-1)
        h = -(top * top.log()).sum(-1) / np.log(20)
        region = torch.where(h <= 0.9, torch.where(p >= 0.02, 1.0, 0.0), 0.5)
        assert {0.0, 0.5, 1.0} == set(region[kept].tolist())
        weight = torch.where(kept, region, 0.25)
    expected = (weight * kl).sum() / base.sum()
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-5, atol=1e-7)
    wanted = torch.autograd.grad(expected, [hidden[1], head])
    for a, b in zip(torch.autograd.grad(found, [hidden[1], head]), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_bounds_of_regions_by_hand():
    assert region_bounds(np.arange(1, 6) / 10, np.arange(5.0), 0.25) == pytest.approx((0.2, 1.0))


# What is trained


def test_every_small_tensor_belongs_to_one_part_and_no_expert_matrix_to_any(checkpoint):
    parts = {name: checkpoint.family.part_of(name) for name in checkpoint.names}
    none = {name for name, part in parts.items() if part is None}
    assert none == {"model.embed_tokens.weight"} | {n for n in parts if n.endswith(("_blocks", "_scales"))}
    assert set(parts.values()) == {*EVERYTHING_SMALL, "lm_head", None}
    assert parts["model.norm.weight"] == parts["model.layers.0.post_attention_layernorm.weight"] == "norms"
    assert parts["model.layers.3.self_attn.sinks"] == "attention"


def test_parameters_are_counted_without_removed_experts(checkpoint, keep):
    trained = Trained(checkpoint, ["routers", "expert_biases", "norms"], None, torch.device("cpu"))
    per_expert = world.HIDDEN + 1 + 2 * world.INTERMEDIATE + world.HIDDEN
    expected = world.LAYERS * (4 * per_expert + 2 * world.HIDDEN) + world.HIDDEN
    assert trained.parameters(keep.mask) == expected
    low = Trained(checkpoint, ["attention"], 2, torch.device("cpu"))
    q, kv, h = world.HEADS * world.HEAD_DIM, world.KV_HEADS * world.HEAD_DIM, world.HIDDEN
    factors = 2 * (4 * h + 2 * q + 2 * kv)
    assert low.parameters(keep.mask) == world.LAYERS * (factors + q + 2 * kv + h + world.HEADS)
    whole = sum(
        n.numel() * (2 if "_blocks" in k else 1) for k, n in tensors(checkpoint.folder).items() if "_scales" not in k
    )
    experts = 3 * world.HIDDEN * world.INTERMEDIATE + per_expert
    assert slicing.num_parameters(checkpoint, 4) == whole - world.LAYERS * 4 * experts


def test_an_untrained_low_rank_update_is_none_and_a_trained_one_is_a_product(checkpoint):
    low = Trained(checkpoint, ["attention"], 2, torch.device("cpu"))
    assert all(same(value, checkpoint.tensor(name)) for name, value in low.final())
    name = "model.layers.1.self_attn.o_proj.weight"
    up, down = low.leaves[f"{name}.up"], low.leaves[f"{name}.down"]
    with torch.no_grad():
        up.fill_(0.5)
    expected = checkpoint.tensor(name).double() + up.double() @ down.double()
    torch.testing.assert_close(dict(low.final())[name].double(), expected.detach(), rtol=2**-8, atol=1e-6)


def test_a_part_that_the_model_lacks_is_refused(tmp_path):
    state = world.state_dict()
    del state["lm_head.weight"]
    tied = Checkpoint(str(world.write_checkpoint(tmp_path / "tied", state, tie_word_embeddings=True)))
    with pytest.raises(ParameterError, match=r"trained: .*tied has no 'lm_head' of its own"):
        Trained(tied, ["lm_head"], None, torch.device("cpu"))


# The schedule and the text


def test_every_block_is_trained_on_once_before_any_is_again():
    schedule = replace(SCHEDULE, batch_blocks=3)
    ids = np.concatenate([schedule.blocks_of(step, 8) for step in range(8)])
    for epoch in ids.reshape(3, 8):
        assert sorted(epoch) == list(range(8))
    assert len({tuple(epoch) for epoch in ids.reshape(3, 8)}) == 3
    assert not np.array_equal(ids, np.concatenate([replace(schedule, seed=1).blocks_of(s, 8) for s in range(8)]))


def test_rate_warms_up_and_falls_to_little():
    rates = [Schedule(200, 1, 1.0, 1, 1).rate(step) for step in range(200)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0 and max(rates) == 1.0
    assert rates[105] == pytest.approx(0.51) and rates[-1] < 0.021  # half way down, and the end


def test_a_row_that_reaches_into_the_held_out_blocks_is_not_scored_there():
    """EOS is 9: of the last two blocks' rows, the first began before them."""
    tokens = np.array([[1, 2, 9, 3], [4, 5, 6, 7], [8, 9, 1, 2], [3, 9, 4, 5]], np.int32)
    blocks = Blocks("p", "calib", tokens, np.array([[0, 1, 1, 1]] * 4, bool), 4, "")
    text, held_out = hold_back(blocks, 2, 9)
    assert text.tokens.tolist() == tokens[:2].tolist() and held_out.tokens.tolist() == tokens[2:].tolist()
    assert held_out.kept.astype(int).tolist() == [[0, 0, 1, 1], [0, 1, 1, 1]]
    assert blocks.kept[2].tolist() == [False, True, True, True]
    with pytest.raises(ParameterError, match=r"held_out_blocks: found 2, .*Hold back more"):
        hold_back(blocks, 2, 77)


# The checkpoint


def test_training_takes_the_student_towards_the_whole_model(recovered):
    curve = record(recovered)["curve"]
    assert [look["step"] for look in curve] == [0, 2, 4, 6]
    assert [look["tokens"] for look in curve] == [0, 160, 320, 480]
    kl = [look["held_out_kl"] for look in curve]
    assert kl[-1] < 0.9 * kl[0]


def test_only_small_tensors_differ_from_the_pruned_checkpoint(recovered, checkpoint, keep, tmp_path):
    slicing.prune(checkpoint, keep, tmp_path / "pruned", progress=False)
    pruned, found = tensors(tmp_path / "pruned"), tensors(recovered)
    assert list(pruned) == list(found)
    for name, value in found.items():
        matrix = name.endswith(("_blocks", "_scales")) or name in ("model.embed_tokens.weight", "lm_head.weight")
        assert same(value, pruned[name]) == matrix, name
    for file in ("config.json", "tokenizer.json", "expert_mapping.json", "LICENSE"):
        assert (recovered / file).read_bytes() == (tmp_path / "pruned" / file).read_bytes()


def test_the_manifest_says_what_was_trained_on_what(recovered, checkpoint, keep, text):
    manifest = json.loads((recovered / "prune_manifest.json").read_text())
    about = manifest["recovered"]
    assert manifest["chosen_by"] == keep.chosen_by and manifest["source"]["model_sha256"] == checkpoint.sha256
    assert about["trained"] == EVERYTHING_SMALL and about["steps"] == about["best_step"] == 6
    assert about["tokens"] == 480 and about["text"]["rows_sha256"] == text.rows_sha256
    assert 0 < about["parameters_share"] == about["parameters"] / slicing.num_parameters(checkpoint, world.EXPERTS) < 1
    slicing_hashes = {f.name for f in recovered.iterdir()} - {"prune_manifest.json"}
    assert set(manifest["sha256"]) == slicing_hashes


@pytest.mark.parametrize("parts, rank", [(EVERYTHING_SMALL, None), ([*EVERYTHING_SMALL, "lm_head"], 2)])
def test_what_is_written_is_what_was_trained(checkpoint, keep, text, cpu, tmp_path, parts, rank):
    """transformers, loading the checkpoint, gives the perplexity that the best look saw: updates merged, values rounded."""
    run(checkpoint, keep, text, cpu, tmp_path / "model", parts, rank)
    model = world.load_with_transformers(AutoModelForCausalLM, tmp_path / "model")
    _, held_out = hold_back(text, 4, checkpoint.tokenizer.eos_token_id)
    logits = world.logits(model, held_out.tokens)[:, :-1].double()
    targets, kept = torch.from_numpy(held_out.tokens[:, 1:]).long(), torch.from_numpy(held_out.kept[:, 1:])
    nll = F.cross_entropy(logits[kept], targets[kept])
    best = record(tmp_path / "model")["curve"][-1]
    assert best["step"] == record(tmp_path / "model")["best_step"] == 6
    assert best["held_out_ppl"] == pytest.approx(nll.exp().item(), rel=1e-4)
    generated = model.generate(torch.from_numpy(text.tokens[:1, :8]).long(), max_new_tokens=4, do_sample=False)
    assert generated.shape == (1, 12)


def test_no_steps_change_nothing(checkpoint, keep, text, cpu, tmp_path):
    run(checkpoint, keep, text, cpu, tmp_path / "model", schedule=replace(SCHEDULE, steps=0))
    slicing.prune(checkpoint, keep, tmp_path / "pruned", progress=False)
    found, expected = tensors(tmp_path / "model"), tensors(tmp_path / "pruned")
    assert all(same(found[name], expected[name]) for name in expected)


def test_keeping_all_experts_stays_at_the_base(checkpoint, text, cpu, tmp_path):
    """There is nothing to learn: no look is better than the first, and the first is the whole model."""
    run(checkpoint, slicing.keep_all(checkpoint), text, cpu, tmp_path / "model")
    curve = record(tmp_path / "model")["curve"]
    assert curve[0]["held_out_kl"] < 1e-6
    assert all(same(value, checkpoint.tensor(name)) for name, value in tensors(tmp_path / "model").items())


def test_streamed_layers_give_the_same_bytes(recovered, checkpoint, keep, text, cpu, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "RESIDENT_SHARE", 0)
    run(checkpoint, keep, text, cpu, tmp_path / "model")
    found, expected = tensors(tmp_path / "model"), tensors(recovered)
    assert all(same(found[name], expected[name]) for name in expected)


def test_a_prune_of_a_recovered_checkpoint_still_says_that_it_was_trained(recovered, tmp_path):
    further = Checkpoint(str(recovered))
    ids = np.tile(np.arange(2), (world.LAYERS, 1))
    manifest = slicing.prune(
        further, KeepSet(ids, 4, {"criterion": "first", "keep_n": 2}), tmp_path / "two", progress=False
    )
    assert manifest["recovered"] == json.loads((recovered / "prune_manifest.json").read_text())["recovered"]
    assert manifest["num_experts_after"] == 2


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", [0, 4])
def test_a_killed_run_ends_as_one_that_was_not(recovered, checkpoint, keep, text, cpu, tmp_path, capsys, step):
    def kill(curve):
        if curve[-1].step == step:
            raise Killed

    with pytest.raises(Killed):
        run(checkpoint, keep, text, cpu, tmp_path / "model", on_look=kill)
    assert not (tmp_path / "model").exists()
    run(checkpoint, keep, text, cpu, tmp_path / "model")
    assert ("going on from step 4" in capsys.readouterr().out) == (step == 4)
    found, expected = tensors(tmp_path / "model"), tensors(recovered)
    assert all(same(found[name], expected[name]) for name in expected)
    for mine, other in zip(record(tmp_path / "model")["curve"], record(recovered)["curve"], strict=True):
        assert {**mine, "seconds": 0} == {**other, "seconds": 0}
    assert not (training_folder(tmp_path / "model") / "state.safetensors").exists()


def test_another_runs_state_is_set_aside(checkpoint, keep, text, cpu, tmp_path, capsys):
    def kill(curve):
        if curve[-1].step:
            raise Killed

    other = replace(SCHEDULE, learning_rate=1e-3)
    with pytest.raises(Killed):
        run(checkpoint, keep, text, cpu, tmp_path / "model", schedule=other, on_look=kill)
    run(checkpoint, keep, text, cpu, tmp_path / "model", schedule=replace(SCHEDULE, steps=0))
    assert "is of a run with other settings" in capsys.readouterr().out
    assert (training_folder(tmp_path / "model") / "state.safetensors.old").is_file()


def test_a_finished_run_is_not_repeated_and_nothing_is_overwritten(recovered, checkpoint, keep, text, cpu):
    before = (recovered / "prune_manifest.json").read_bytes()
    manifest = run(checkpoint, keep, text, cpu, recovered, on_look=lambda curve: 1 / 0)
    assert manifest == json.loads(before)
    with pytest.raises(CheckpointError, match="exists already, and not from this run"):
        run(checkpoint, keep, text, cpu, recovered, schedule=replace(SCHEDULE, seed=1))


def test_training_stops_when_looks_do_not_improve_and_the_best_is_written(checkpoint, keep, text, cpu, tmp_path):
    wild = Schedule(steps=40, batch_blocks=2, learning_rate=3.0, check_every=2, patience=2)
    run(checkpoint, keep, text, cpu, tmp_path / "model", schedule=wild)
    found = record(tmp_path / "model")
    kl = [look["held_out_kl"] for look in found["curve"]]
    assert len(kl) < 20 and found["best_step"] == found["curve"][int(np.argmin(kl))]["step"]
    assert len(kl) - 1 - int(np.argmin(kl)) == 2


@pytest.mark.parametrize("rank", [None, 2])
def test_trained_tensors_alone_give_the_checkpoint_again(checkpoint, keep, text, cpu, tmp_path, rank):
    run(checkpoint, keep, text, cpu, tmp_path / "first", rank=rank)
    file = training_folder(tmp_path / "first") / "trained.safetensors"
    with safe_open(file, "pt") as opened:
        assert not any("_blocks" in name for name in opened.keys())
    none = replace(SCHEDULE, steps=0)
    run(checkpoint, keep, text, cpu, tmp_path / "again", rank=rank, schedule=none, init=file)
    a, b = tensors(tmp_path / "first"), tensors(tmp_path / "again")
    assert all(same(a[name], b[name]) for name in a)
    first, again = (record(tmp_path / name)["recovered"] for name in ("first", "again"))
    assert first["init"] is None and again["init"]["text"] == first["text"]
    assert again["tokens"] == first["tokens"] == 480 and again["steps"] == 0
    for damage, message in ((None, "does not exist"), (b"no tensors", "cannot be read")):
        bad = tmp_path / f"{message}.safetensors"
        if damage:
            bad.write_bytes(damage)
        with pytest.raises(ResultError, match=rf"init: .*{message}"):
            run(checkpoint, keep, text, cpu, tmp_path / "bad", rank=rank, schedule=none, init=bad)
    with pytest.raises(ResultError, match="same keep-set"):
        run(checkpoint, slicing.keep_all(checkpoint), text, cpu, tmp_path / "all", schedule=none, init=file)
    with pytest.raises(ResultError, match="other parts were trained"):
        run(checkpoint, keep, text, cpu, tmp_path / "less", ["routers"], schedule=none, init=file)


def test_weights_read_while_scoring_can_be_trained_through(checkpoint, keep, text, cpu):
    """A pass without gradients comes first: what it leaves in memory must serve one with gradients."""
    opened = Weights(checkpoint, cpu, training=True)
    forward.score(opened, text, progress=False)
    layer = dict(opened.layers())[0]
    assert not any(parameter.is_inference() for parameter in layer.parameters())


PROGRAM = """
import os, sys
from eaftlib.engine import placement, traversal
from eaftlib.model.checkpoint import Checkpoint
from eaftlib.pruning.keepsets import KeepSet
from eaftlib.recovery.loop import Objective, Schedule
from eaftlib.recovery.recover import recover
from eaftlib.text.packs import PackSource, pack_blocks
import numpy as np

model, packs, out = sys.argv[1:]
traversal.TRAINING_VALUES["cpu"] = 2 * 40 * 64  # two blocks at once: one rank has one micro-batch more
checkpoint = Checkpoint(model)
keep = KeepSet(np.tile(np.arange(4), (checkpoint.num_layers, 1)), checkpoint.num_experts, {"criterion": "first", "keep_n": 4})
spans = checkpoint.family.completion_spans
text = pack_blocks(PackSource(packs), "UNION", checkpoint.tokenizer, spans, seq_len=40, num_blocks=12)
settings = {"trained": ["routers", "norms"], "attention_rank": None, "packs": packs, "pack_files": None}
settings |= {"seq_len": 40, "num_blocks": 12, "held_out_blocks": 4}
recover(checkpoint, keep, text, placement.place("cpu", "float32"), parts=["routers", "norms"], attention_rank=None,
        held_out_blocks=4, schedule=Schedule(4, 5, 1e-3, 2, 9), objective=Objective(), settings=settings, out_dir=out)
"""


def test_ranks_share_the_blocks_of_a_step(model_folder, packs_folder, tmp_path):
    """Five blocks a step in micro-batches of two; sums over ranks are rounded otherwise than one rank's."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--main_process_port", "0", "--num_processes", "2"]
    for name, command in (("alone", []), ("together", launch)):
        arguments = [program, model_folder, packs_folder, tmp_path / name]
        subprocess.run([sys.executable, *command, *arguments], env=environment(), check=True, capture_output=True)
    alone, together = (record(tmp_path / name)["curve"] for name in ("alone", "together"))
    assert [look["step"] for look in alone] == [look["step"] for look in together] == [0, 2, 4]
    for a, b in zip(alone, together, strict=True):
        assert b["held_out_kl"] == pytest.approx(a["held_out_kl"], rel=1e-3)
        assert (a["loss"] is None and b["loss"] is None) or b["loss"] == pytest.approx(a["loss"], rel=1e-3)
    assert alone[2]["held_out_kl"] < 0.99 * alone[0]["held_out_kl"]
    a, b = tensors(tmp_path / "alone"), tensors(tmp_path / "together")
    assert list(a) == list(b) and all(same(a[name], b[name]) for name in a if ".experts." in name)
