"""One pass of the library against AutoModelForCausalLM on the same checkpoint: float32, eager attention and experts."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import world
from test_token_statistics import exact
from transformers import AutoModelForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssDecoderLayer

from eaftlib.engine import forward, traversal, weights
from eaftlib.engine import placement as devices
from eaftlib.engine.weights import Weights, decoded_bytes
from eaftlib.errors import ParameterError, ScoringError
from eaftlib.kernels import token_statistics as kernel
from eaftlib.model.checkpoint import Checkpoint
from eaftlib.text.harmony import completion_spans
from eaftlib.text.packs import Blocks, pack_blocks

CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def keep_masks(count, keep_n, seed=0):
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, world.LAYERS, world.EXPERTS), bool)
    for mask in masks.reshape(-1, world.EXPERTS):
        mask[rng.permutation(world.EXPERTS)[:keep_n]] = True
    return list(masks)


def reference(model, blocks, removed=None, k=20):
    """(nll, entropy, log-probabilities) of kept tokens from transformers' own logits, in float64."""
    hooks = [] if removed is None else world.mask_routers(model, removed)
    logits = world.logits(model, blocks.tokens).double()
    for hook in hooks:
        hook.remove()
    block, position = np.nonzero(blocks.kept)
    z = logits[block, position - 1]
    log_p = z.log_softmax(-1)
    targets = torch.from_numpy(blocks.tokens[block, position]).long()
    top = z.topk(k).values.log_softmax(-1)
    return -log_p.gather(1, targets[:, None])[:, 0], -(top.exp() * top).sum(-1) / np.log(k), log_p


def assert_scores(variant, expected):
    np.testing.assert_allclose(variant.nll, expected[0].numpy(), **CLOSE)
    np.testing.assert_allclose(variant.entropy, expected[1].numpy(), **CLOSE)


@pytest.fixture(params=["resident", "streamed"])
def mode(request, monkeypatch):
    if request.param == "streamed":
        monkeypatch.setattr(weights, "RESIDENT_SHARE", 0)
    return request.param


@pytest.fixture
def small_batches(monkeypatch):
    """Micro-batches of two blocks, and slices of seven tokens: several of each, with a remainder."""
    monkeypatch.setitem(traversal.MICRO_BATCH_TOKENS, "cpu", 80)
    monkeypatch.setattr(kernel, "slice_rows", lambda vocab, device: 7)


def test_statistics_equal_transformers(checkpoint, blocks, cpu, hf_model, mode, small_batches):
    run = forward.score(Weights(checkpoint, cpu), blocks, progress=False)
    assert len(run.variants) == 1 and run.variants[0].kl_to_base is None
    assert len(run.variants[0].nll) == blocks.kept.sum()
    assert_scores(run.variants[0], reference(hf_model, blocks))


@pytest.mark.parametrize("seq_len", [2, 15, 16, 17, 64, 200])
def test_sequence_lengths_around_the_window(checkpoint, source, tokenizer, cpu, hf_model, seq_len):
    """200 exceeds the length the rotary embedding was scaled from (64) too."""
    blocks = pack_blocks(
        source, "UNION", tokenizer, completion_spans, seq_len=seq_len, num_blocks=max(3, 400 // seq_len)
    )
    assert_scores(
        forward.score(Weights(checkpoint, cpu), blocks, progress=False).variants[0], reference(hf_model, blocks)
    )


def test_other_entropy_topk(checkpoint, blocks, cpu, hf_model):
    run = forward.score(Weights(checkpoint, cpu), blocks, entropy_topk=5, progress=False)
    assert_scores(run.variants[0], reference(hf_model, blocks, k=5))


def test_one_token_against_exact_arithmetic(checkpoint, blocks, cpu, hf_model):
    variant = forward.score(Weights(checkpoint, cpu), blocks, progress=False).variants[0]
    block, position = (x[0] for x in np.nonzero(blocks.kept))
    z = world.logits(hf_model, blocks.tokens[block : block + 1])[0, position - 1]
    nll, entropy = exact(z, blocks.tokens[block, position], 20)
    assert variant.nll[0] == pytest.approx(nll, rel=1e-4) and variant.entropy[0] == pytest.approx(entropy, rel=1e-4)


@pytest.mark.parametrize("keep_n", [world.TOP_K, 4, 7])
def test_a_keep_set_is_the_model_with_masked_routers(checkpoint, blocks, cpu, hf_model, mode, small_batches, keep_n):
    (keep,) = keep_masks(1, keep_n)
    run = forward.score(Weights(checkpoint, cpu), blocks, keep_sets=[keep], progress=False)
    expected = reference(hf_model, blocks, removed=~keep)
    assert_scores(run.variants[0], expected)
    assert (expected[0] - reference(hf_model, blocks)[0]).abs().mean() > 0.01, "the keep-set should change the model"


def test_many_keep_sets_in_one_pass_equal_one_at_a_time(checkpoint, blocks, cpu, mode, small_batches):
    keep_sets = [keep_masks(1, 4)[0], None, *keep_masks(2, 6, seed=1)]
    together = forward.score(Weights(checkpoint, cpu), blocks, keep_sets=keep_sets, progress=False).variants
    for keep, variant in zip(keep_sets, together, strict=True):
        alone = forward.score(Weights(checkpoint, cpu), blocks, keep_sets=[keep], progress=False).variants[0]
        np.testing.assert_array_equal(variant.nll, alone.nll)
        np.testing.assert_array_equal(variant.entropy, alone.entropy)


@pytest.mark.parametrize("order", ["base first", "base last"])
def test_kl_and_top1_against_transformers(checkpoint, blocks, cpu, hf_model, small_batches, order):
    (keep,) = keep_masks(1, 4)
    keep_sets = [None, keep] if order == "base first" else [keep, None]
    variants = forward.score(Weights(checkpoint, cpu), blocks, keep_sets=keep_sets, progress=False).variants
    base, pruned = variants if order == "base first" else variants[::-1]
    log_p, log_q = reference(hf_model, blocks)[2], reference(hf_model, blocks, removed=~keep)[2]
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    np.testing.assert_allclose(pruned.kl_to_base, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(pruned.same_top1, log_p.argmax(-1) == log_q.argmax(-1))
    assert base.same_top1.all() and base.kl_to_base.max() < 1e-5
    assert 0 < pruned.same_top1.mean() < 1


def test_no_kl_without_the_whole_model(checkpoint, blocks, cpu):
    run = forward.score(Weights(checkpoint, cpu), blocks, keep_sets=keep_masks(2, 4), progress=False)
    assert all(v.kl_to_base is None and v.same_top1 is None for v in run.variants)


def test_micro_batches_change_nothing(checkpoint, blocks, cpu, monkeypatch):
    whole = forward.score(Weights(checkpoint, cpu), blocks, progress=False).variants[0]
    monkeypatch.setitem(traversal.MICRO_BATCH_TOKENS, "cpu", 1)
    single = forward.score(Weights(checkpoint, cpu), blocks, progress=False).variants[0]
    np.testing.assert_allclose(single.nll, whole.nll, rtol=1e-5, atol=1e-5)


def test_streaming_reads_each_layer_once(checkpoint, blocks, cpu, monkeypatch, small_batches):
    read = []
    read_layer = Weights._read
    monkeypatch.setattr(Weights, "_read", lambda self, i: read.append(i) or read_layer(self, i))
    monkeypatch.setattr(weights, "RESIDENT_SHARE", 0)
    forward.score(Weights(checkpoint, cpu), blocks, keep_sets=keep_masks(2, 4), progress=False)
    assert read == list(range(world.LAYERS))


def test_bfloat16_is_close_to_float32(checkpoint, blocks, cpu):
    half = devices.place("cpu", "bfloat16")
    a, b = (forward.score(Weights(checkpoint, p), blocks, progress=False).variants[0] for p in (cpu, half))
    assert b.nll.dtype == np.float32
    assert np.abs(a.nll - b.nll).mean() < 0.1 * a.nll.mean()


def test_a_checkpoint_of_bfloat16_experts_and_tied_embeddings(tmp_path, blocks, cpu):
    state = world.state_dict(seed=5)
    for name in [n for n in state if n.endswith("_blocks")]:
        scales = state.pop(name.replace("_blocks", "_scales"))
        shape = state.pop(name).shape[:2]
        values = torch.randn(*shape, scales.shape[-1] * 32, generator=torch.Generator().manual_seed(len(state))) * 0.1
        state[name.removesuffix("_blocks")] = values.bfloat16().transpose(1, 2).contiguous()
    del state["lm_head.weight"]
    folder = world.write_checkpoint(tmp_path / "m", state, quantization_config=None, tie_word_embeddings=True)
    config = world.read_config(folder)
    del config["quantization_config"]
    (folder / "config.json").write_text(world.json.dumps(config))
    model = world.load_with_transformers(AutoModelForCausalLM, folder)
    run = forward.score(Weights(Checkpoint(str(folder)), cpu), blocks, progress=False)
    assert_scores(run.variants[0], reference(model, blocks))


@pytest.mark.parametrize("index", [0, 10, -1])
def test_nan_logits_name_block_and_position(checkpoint, blocks, cpu, monkeypatch, small_batches, mode, index):
    """The logits of one kept token are damaged on their way."""
    block, position = (int(x[index]) for x in np.nonzero(blocks.kept))
    logits_of, seen = kernel.logits_of, []

    def damaged(hidden, head):
        logits = logits_of(hidden, head)
        row = index % blocks.kept.sum() - len(seen)
        seen.extend(logits)
        if 0 <= row < len(logits):
            logits[row, 5] = float("nan")
        return logits

    monkeypatch.setattr(kernel, "logits_of", damaged)
    with pytest.raises(ScoringError, match=rf"^block {block}, position {position}: nll nan"):
        forward.score(Weights(checkpoint, cpu), blocks, progress=False)


def test_nan_weights_are_an_error_in_the_block_that_meets_them(tmp_path, blocks, cpu, small_batches):
    state, tokens = world.state_dict(), blocks.tokens.copy()
    poison = world.VOCAB - 1  # no token of the tokenizer
    state["model.embed_tokens.weight"][poison] = float("nan")
    block = int(np.flatnonzero(blocks.kept.any(1))[-1])
    tokens[block, 5] = poison
    damaged = Checkpoint(str(world.write_checkpoint(tmp_path / "m", state)))
    with pytest.raises(ScoringError, match=rf"^block {block}, position"):
        forward.score(Weights(damaged, cpu), Blocks("p", "all", tokens, blocks.kept, 1, ""), progress=False)
    healthy = Blocks("p", "all", blocks.tokens, blocks.kept, 1, "")
    assert np.isfinite(forward.score(Weights(damaged, cpu), healthy, progress=False).variants[0].nll).all()


def test_recording_needs_a_single_keep_set(checkpoint, blocks, cpu):
    with pytest.raises(ValueError, match="single keep-set"):
        forward.score(Weights(checkpoint, cpu), blocks, keep_sets=[None, None], record_experts=True, progress=False)


def test_decoded_bytes_count_the_decoded_layers(checkpoint, hf_model):
    values = sum(p.numel() for p in hf_model.model.layers.parameters())
    assert decoded_bytes(checkpoint, torch.float32) == 4 * values
    assert decoded_bytes(checkpoint, torch.bfloat16) == 2 * values


def test_placement(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    placed = devices.place()
    assert (placed.device.type, placed.precision.products) == ("cpu", torch.float32) and "no GPU is present" in str(
        placed
    )
    assert devices.place("cpu", "bfloat16").precision.products == torch.bfloat16
    with pytest.raises(ParameterError, match="'cuda' was asked for, but PyTorch sees no GPU"):
        devices.place("cuda")
    with pytest.raises(ParameterError, match="dtype: found 'fp8'"):
        devices.place("cpu", "fp8")


@pytest.mark.parametrize(
    "capability, dtype", [((6, 0), torch.float32), ((7, 5), torch.float16), ((8, 0), torch.bfloat16)]
)
def test_a_gpu_runs_in_bfloat16_only_where_it_has_it(monkeypatch, capability, dtype):
    fake = SimpleNamespace(is_available=lambda: True, device_count=lambda: 1)
    fake.get_device_capability = lambda device: capability
    for name, value in vars(fake).items():
        monkeypatch.setattr(torch.cuda, name, value)
    assert devices.place().precision.products == dtype


@pytest.mark.parametrize("device", ["gpu", "warp9"])
def test_an_unknown_device_is_a_parameter_error(device):
    with pytest.raises(ParameterError, match=device):
        devices.place(device)


def test_every_gpu_is_taken_unless_one_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    placed = devices.place(dtype="bfloat16")
    assert placed.processes == 4 and str(placed) == "4 x cuda, bfloat16 (4 GPUs are present)"
    assert placed.of_rank(2) == replace(placed, device=torch.device("cuda:2"), processes=1)
    assert devices.place("cuda", "bfloat16").processes == devices.place("cuda:3", "bfloat16").processes == 1
    assert devices.place("cpu").of_rank(1) == devices.place("cpu")


def test_processes_of_a_launcher_take_their_own_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    placed = devices.place(dtype="bfloat16")
    assert placed.device == torch.device("cuda:3") and placed.processes == 1
    assert devices.place("cuda", "bfloat16").device == torch.device("cuda:0")


def test_a_memory_limit_is_in_gigabytes_and_of_gpus_only(monkeypatch):
    assert devices.place("cpu", max_gpu_memory=16.0).max_bytes is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    placed = devices.place("cuda", "bfloat16", 15.5)
    assert placed.max_bytes == 15_500_000_000 and "at most 15.5 GB" in str(placed)


@pytest.fixture
def short_memory(monkeypatch):
    """A layer that runs out of memory when it is given more than ``most`` blocks at once."""

    def limit(most):
        forward_layer = GptOssDecoderLayer.forward

        def limited(self, hidden_states, **kwargs):
            if len(hidden_states) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return forward_layer(self, hidden_states, **kwargs)

        monkeypatch.setattr(GptOssDecoderLayer, "forward", limited)

    return limit


@pytest.mark.parametrize("most", [3, 2, 1])
def test_too_little_memory_halves_the_micro_batch_and_goes_on(checkpoint, blocks, cpu, mode, short_memory, most):
    """5 blocks at once, then 2, then 1; two keep-sets, none of which may go through a layer twice."""
    keep_sets = [None, *keep_masks(1, 4)]
    expected = forward.score(Weights(checkpoint, cpu), blocks, keep_sets=keep_sets, progress=False)
    short_memory(most)
    with pytest.warns(UserWarning, match="ran out of memory: going on with") as warned:
        found = forward.score(Weights(checkpoint, cpu), blocks, keep_sets=keep_sets, progress=False)
    assert [int(re.search(r"with (\d+) blocks", str(w.message))[1]) for w in warned] == ([2] if most > 1 else [2, 1])
    for a, b in zip(found.variants, expected.variants, strict=True):
        np.testing.assert_allclose(a.nll, b.nll, rtol=1e-5, atol=1e-5)


def test_one_block_that_does_not_fit_is_an_error_that_says_what_to_do(checkpoint, blocks, cpu, short_memory):
    short_memory(0)
    with pytest.raises(ScoringError, match=r"too little memory for one block of 40 tokens.*Use shorter sequences"):
        with pytest.warns(UserWarning, match="going on with"):
            forward.score(Weights(checkpoint, cpu), blocks, progress=False)


def test_resident_layers_are_read_once_for_all_passes(checkpoint, blocks, cpu, monkeypatch):
    read = []
    read_layer = Weights._read
    monkeypatch.setattr(Weights, "_read", lambda self, i: read.append(i) or read_layer(self, i))
    opened = Weights(checkpoint, cpu)
    first, second = (forward.score(opened, blocks, keep_sets=k, progress=False) for k in (keep_masks(1, 4), [None]))
    assert read == list(range(world.LAYERS))
    np.testing.assert_array_equal(second.variants[0].nll, forward.score(opened, blocks, progress=False).variants[0].nll)
    assert (first.variants[0].nll != second.variants[0].nll).any()
