"""Blocks through the layers and back: gradients are transformers' own, and layers are afterwards as they were."""

import contextlib
import warnings
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import world
from transformers import AutoModelForCausalLM

from eaftlib.engine import backend, forward, traversal, weights
from eaftlib.engine.observers import Experts, Observer
from eaftlib.engine.placement import place
from eaftlib.engine.traversal import Traversal
from eaftlib.engine.variants import Variant
from eaftlib.engine.weights import Weights
from eaftlib.errors import ParameterError

TRAINED = ("router", "_bias", "norm", "self_attn")  # routers, expert biases, norms and attention


@pytest.fixture(params=["resident", "streamed"])
def training(request, checkpoint, cpu, monkeypatch):
    """Weights to train with; streamed layers are read once on each way."""
    monkeypatch.setitem(traversal.TRAINING_VALUES, "cpu", 80 * world.HIDDEN)
    if request.param == "streamed":
        monkeypatch.setattr(weights, "RESIDENT_SHARE", 0)
    return Weights(checkpoint, cpu, training=True)


def small_parameters(checkpoint):
    """What is trained, by full name; values a little off the checkpoint's, so that using the stored ones would show."""
    generator = torch.Generator().manual_seed(0)
    names = [n for n in checkpoint.names if any(part in n for part in TRAINED)]
    stored = {name: checkpoint.tensor(name).float() for name in names}
    return {n: (v + 0.05 * torch.randn(v.shape, generator=generator)).requires_grad_() for n, v in stored.items()}


def keep_mask(keep_n, seed=0):
    rng = np.random.default_rng(seed)
    mask = np.zeros((world.LAYERS, world.EXPERTS), bool)
    for layer in mask:
        layer[rng.permutation(world.EXPERTS)[:keep_n]] = True
    return mask


def loss_on(blocks, lm_head):
    """Cross entropy summed over kept tokens."""
    tokens, kept = torch.from_numpy(blocks.tokens).long(), torch.from_numpy(blocks.kept)

    def loss(ids, hidden):
        logits = hidden[-1][:, :-1] @ lm_head.T
        return F.cross_entropy(logits[kept[ids][:, 1:]], tokens[ids][:, 1:][kept[ids][:, 1:]], reduction="sum")

    return loss


def gradients_by_transformers(model_folder, changed, blocks, removed):
    model = world.load_with_transformers(AutoModelForCausalLM, model_folder).float()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in changed.items():
            parameters[name].copy_(value)
    hooks = world.mask_routers(model, removed)
    loss_on(blocks, model.lm_head.weight)(
        torch.arange(len(blocks.tokens)), [model.model(torch.from_numpy(blocks.tokens).long()).last_hidden_state]
    ).backward()
    for hook in hooks:
        hook.remove()
    return {name: parameters[name].grad for name in changed}


@pytest.mark.parametrize("keep_n", [world.EXPERTS, 4])
def test_gradients_equal_transformers(training, checkpoint, model_folder, blocks, keep_n):
    """Of the whole model and of a pruned one, whose removed experts' biases get none."""
    keep, changed = keep_mask(keep_n), small_parameters(checkpoint)
    assert len(changed) == 15 * world.LAYERS + 1
    run = Traversal(training, blocks, [Variant(training, keep, changed)])
    seen = sum(run.backward(loss_on(blocks, training.lm_head)))
    assert seen == 2 * world.LAYERS * blocks.tokens.size
    expected = gradients_by_transformers(model_folder, changed, blocks, ~keep)
    for name, value in changed.items():
        assert expected[name].abs().max() > 0, name
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(
            value.grad, expected[name], rtol=1e-3, atol=1e-4 * scale, msg=lambda m, n=name: n + m
        )
        if keep_n < world.EXPERTS and name.endswith("router.bias"):
            assert not value.grad[torch.from_numpy(~keep[int(name.split(".")[2])])].any()


def test_gradients_add_up_over_passes(training, checkpoint, blocks):
    changed = small_parameters(checkpoint)
    run = Traversal(training, blocks, [Variant(training, changed=changed)])
    once = {}
    for _ in range(2):
        for _ in run.backward(loss_on(blocks, training.lm_head)):
            pass
        once = once or {name: value.grad.clone() for name, value in changed.items()}
    for name, value in changed.items():
        torch.testing.assert_close(value.grad, 2 * once[name], rtol=1e-5, atol=1e-6)


def test_streamed_gradients_are_the_resident_ones(checkpoint, cpu, blocks, monkeypatch):
    found = []
    for share in (weights.RESIDENT_SHARE, 0):
        monkeypatch.setattr(weights, "RESIDENT_SHARE", share)
        opened, changed = Weights(checkpoint, cpu, training=True), small_parameters(checkpoint)
        assert opened.resident == (share > 0)
        for _ in Traversal(opened, blocks, [Variant(opened, changed=changed)]).backward(
            loss_on(blocks, opened.lm_head)
        ):
            pass
        found.append({name: value.grad for name, value in changed.items()})
    assert all(torch.equal(a, b) for a, b in zip(found[0].values(), found[1].values(), strict=True))


def test_streamed_layers_come_by_one_at_a_time_and_again_in_reverse(checkpoint, cpu, blocks, monkeypatch):
    read_layer, read, alive = Weights._read, [], []

    def watched(self, index):
        assert not any(layer() is not None for layer in alive), "two layers at once"
        read.append(index)
        layer = read_layer(self, index)
        alive.append(weakref.ref(layer))
        return layer

    monkeypatch.setattr(Weights, "_read", watched)
    monkeypatch.setattr(weights, "RESIDENT_SHARE", 0)
    opened, changed = Weights(checkpoint, cpu, training=True), small_parameters(checkpoint)
    for _ in Traversal(opened, blocks, [Variant(opened, changed=changed)]).backward(loss_on(blocks, opened.lm_head)):
        pass
    assert read == [*range(world.LAYERS), *reversed(range(world.LAYERS))]


def test_short_memory_on_the_way_back_counts_no_gradient_twice(training, checkpoint, blocks, monkeypatch):
    changed = small_parameters(checkpoint)
    run = Traversal(training, blocks, [Variant(training, changed=changed)])
    for _ in run.backward(loss_on(blocks, training.lm_head)):
        pass
    expected = {name: value.grad for name, value in changed.items()}
    real = torch.autograd.grad

    def short(value, inputs, *rest):
        found = real(value, inputs, *rest)
        if len(inputs[0]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return found

    monkeypatch.setattr(torch.autograd, "grad", short)
    changed = small_parameters(checkpoint)
    run = Traversal(training, blocks, [Variant(training, changed=changed)])
    with pytest.warns(UserWarning, match="going on with 1 blocks"):
        for _ in run.backward(loss_on(blocks, training.lm_head)):
            pass
    for name, value in changed.items():
        torch.testing.assert_close(value.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_layers_are_as_they_were_after_a_pass_with_keep_sets(checkpoint, cpu, blocks):
    opened = Weights(checkpoint, cpu)
    before = forward.score(opened, blocks, progress=False).variants[0]
    stored = {i: {n: p.clone() for n, p in layer.named_parameters()} for i, layer in opened.layers()}
    forward.score(opened, blocks, keep_sets=[keep_mask(4), keep_mask(2, seed=1)], progress=False)
    for index, layer in opened.layers():
        for name, value in layer.named_parameters():
            assert torch.equal(value, stored[index][name]), f"layer {index}: {name}"
        assert not hasattr(layer.mlp.experts, "probe")
    after = forward.score(opened, blocks, progress=False).variants[0]
    np.testing.assert_array_equal(after.nll, before.nll)


def test_a_failing_layer_leaves_no_probe_behind(checkpoint, cpu, blocks, monkeypatch):
    opened = Weights(checkpoint, cpu)
    layers = [layer for _, layer in opened.layers()]
    monkeypatch.setattr(type(layers[0]), "forward", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(Traversal(opened, blocks, [Variant(opened)], [Experts(opened, blocks)]).forward())
    assert not any(hasattr(layer.mlp.experts, "probe") for layer in layers)


def test_changed_parameters_are_those_of_a_checkpoint_that_has_them(tmp_path, checkpoint, cpu, blocks):
    """Inference, too, takes changed values: the final norm's, a router's weight and an attention bias."""
    names = ["model.norm.weight", "model.layers.1.mlp.router.weight", "model.layers.2.self_attn.q_proj.bias"]
    state = world.state_dict()
    changed = {name: state[name] + 0.25 for name in names}
    other = world.write_checkpoint(tmp_path / "other", state | changed)
    opened = Weights(checkpoint, cpu)
    seen = []

    class Final(Observer):
        def collect(self, ids, hidden):
            seen.append(hidden[0])

    with torch.inference_mode():
        for _ in Traversal(opened, blocks, [Variant(opened, changed=changed)], [Final()]).forward():
            pass
        model = world.load_with_transformers(AutoModelForCausalLM, other).float()
        expected = model.model(torch.from_numpy(blocks.tokens).long())
    torch.testing.assert_close(torch.cat(seen), expected.last_hidden_state, rtol=1e-4, atol=1e-4)


def test_a_backend_can_be_forced_and_says_where_it_cannot_serve(checkpoint, cpu):
    assert backend.resolve(cpu, checkpoint.config).name == "plain"
    assert backend.resolve(replace(cpu, backend="plain"), checkpoint.config, training=True).training
    with pytest.raises(ParameterError, match=r"'fused' needs an NVIDIA GPU of capability 8\.0 or more.*found cpu"):
        Weights(checkpoint, place("cpu", backend="fused"))
    with pytest.raises(ParameterError, match=r"backend: found 'fast', expected one of"):
        Weights(checkpoint, place("cpu", backend="fast"))


@pytest.mark.parametrize(
    "capability, dtype, training, expected",
    [
        ((7, 5), "float32", False, "plain"),
        ((8, 0), "bfloat16", False, "fused"),
        ((9, 0), "float32", False, "fused"),
        ((9, 0), "bfloat16", True, "fused"),
        ((7, 5), "float32", True, "plain"),
    ],
)
def test_the_backend_follows_capability_and_purpose_not_the_grad_mode(
    checkpoint, monkeypatch, capability, dtype, training, expected
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found = backend.resolve(place("cuda", dtype), checkpoint.config, training)
        assert found.name == expected and found.training == training
        halves = expected == "fused" and dtype == "bfloat16"
        assert (found.experts == "measured_grouped") == (len(found.modules) == 2) == halves


@pytest.mark.parametrize(
    "name, shape, message",
    [
        ("model.layers.1.mlp.router.biass", [world.EXPERTS], "no stored parameter of a layer"),
        ("model.layers.9.mlp.router.bias", [world.EXPERTS], "no stored parameter of a layer"),
        ("mlp.router.bias", [world.EXPERTS], "no stored parameter of a layer"),
        ("model.embed_tokens.weight", [world.VOCAB, world.HIDDEN], "no stored parameter of a layer"),
        ("lm_head.weight", [world.HIDDEN, world.VOCAB], r"has shape \[64, 512\], expected \[512, 64\]"),
        ("model.layers.1.mlp.router.bias", [1], r"has shape \[1\], expected \[8\]"),
    ],
)
def test_a_change_that_would_not_be_used_is_refused(checkpoint, cpu, name, shape, message):
    with pytest.raises(ParameterError, match=rf"changed: '{name}' .*{message}|changed: '{name}' {message}"):
        Variant(Weights(checkpoint, cpu), changed={name: torch.zeros(shape)})


def test_weights_for_inference_are_not_trained_through(checkpoint, cpu, blocks):
    opened = Weights(checkpoint, cpu)
    with pytest.raises(ValueError, match=r"opened for inference.*training=True"):
        next(Traversal(opened, blocks, [Variant(opened)]).backward(loss_on(blocks, opened.lm_head)))


def test_a_streamed_layer_is_let_go_only_when_nothing_launched_reads_it_any_more(monkeypatch):
    """On a GPU the reader takes freed memory and writes there; what was launched on a layer may not have ended yet."""

    class Stream:
        def __init__(self, device=None):
            pass

        def synchronize(self):
            pass

    ended = []

    class Current:
        def synchronize(self):
            ended.append(alive[-1]() is not None)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Current())
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    opened = Weights.__new__(Weights)
    opened.device, opened._read, alive = torch.device("cpu"), lambda index: torch.nn.Linear(1, 1), []
    for layer in opened._read_ahead([0, 1, 2]):
        alive.append(weakref.ref(layer))
        del layer
    assert ended == [True, True, True] and not any(layer() for layer in alive)


@pytest.mark.parametrize("memory", ["enough", "short"])
def test_a_model_beside_the_trained_one_is_what_it_is_alone(training, checkpoint, blocks, monkeypatch, memory):
    """Where memory runs out in the trained model's layer, the other's has been through it and must not go again."""
    alone, beside = [], []

    class Final(Observer):
        def collect(self, ids, hidden):
            alone.append(hidden[0])

    whole, pruned = Variant(training), Variant(training, keep_mask(4), small_parameters(checkpoint))
    with torch.inference_mode():
        for _ in Traversal(training, blocks, [whole], [Final()]).forward():
            pass
    run = Variant.run

    def short(self, index, layer, hidden, **inputs):
        if memory == "short" and self is pruned and index == 1 and len(hidden) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return run(self, index, layer, hidden, **inputs)

    def loss(ids, hidden):
        beside.append(hidden[0])
        return loss_on(blocks, training.lm_head)(ids, hidden)

    monkeypatch.setattr(Variant, "run", short)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in Traversal(training, blocks, [whole, pruned]).backward(loss):
            pass
    torch.testing.assert_close(torch.cat(beside), torch.cat(alone), rtol=1e-5, atol=1e-5)
    assert not any(hidden.requires_grad for hidden in beside)


def test_training_holds_no_gradient_of_anything_but_what_is_trained(training, checkpoint, blocks):
    """Above all of no expert matrix: their gradients would be as large as the decoded model."""
    changed = {n: v for n, v in small_parameters(checkpoint).items() if "router" in n}
    for _ in Traversal(training, blocks, [Variant(training, keep_mask(4), changed)]).backward(
        loss_on(blocks, training.lm_head)
    ):
        pass
    assert all(value.grad is not None for value in changed.values())
    for _, layer in training.layers():
        assert not any(p.requires_grad or p.grad is not None for p in layer.parameters())
    assert training.lm_head.grad is None and not training.lm_head.requires_grad
