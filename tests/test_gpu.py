"""What only a GPU can show: kernels at full shape, and that every way of running the model gives the same tokens."""

import math
import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from eaftlib.engine import experts, forward, journal, traversal, weights
from eaftlib.engine import placement as devices
from eaftlib.engine.attention import attention_with_sinks
from eaftlib.engine.traversal import Traversal
from eaftlib.engine.variants import Variant
from eaftlib.engine.weights import Weights
from eaftlib.kernels import mxfp4
from eaftlib.kernels import token_statistics as statistics
from eaftlib.kernels.fused import expert_activation, expert_combination
from eaftlib.kernels.fused import mxfp4 as fused_mxfp4
from eaftlib.kernels.fused import token_statistics as fused_statistics
from eaftlib.model.checkpoint import Checkpoint
from eaftlib.pruning.trace import record
from eaftlib.text.harmony import completion_spans
from eaftlib.text.packs import UNION, PackSource, pack_blocks

pytestmark = pytest.mark.gpu
CONFIG = GptOssConfig()  # gpt-oss-20b's shape
ROOT = Path(__file__).parents[1]
DEMO = ROOT / "demo"


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def normal(*shape, std=1.0, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", dtype=dtype, generator=generator) * std


def relative_error(found, truth):
    return ((found.double() - truth).norm() / truth.norm()).item()


def hard_logits():
    """One row for each hard case, at the full vocabulary."""
    size = CONFIG.vocab_size
    generator = torch.Generator("cuda").manual_seed(0)
    rows = {"ordinary": torch.randn(size, device="cuda", generator=generator) * 3}
    ties = torch.randn(size, device="cuda", generator=generator)
    ties[torch.randperm(size, device="cuda", generator=generator)[:57]] = 6.0
    rows |= {"ties at the 20th place": ties}
    rows |= {"one dominant": torch.randn(size, device="cuda", generator=generator)}
    rows["one dominant"][777] = 60.0
    rows |= {"flat": torch.full((size,), 2.5, device="cuda")}
    rows |= {"of size 100": torch.randn(size, device="cuda", generator=generator).sign() * 100}
    rows |= {"ascending": torch.linspace(-40, 40, size, device="cuda")}
    return rows


@pytest.mark.parametrize("name", hard_logits() if torch.cuda.is_available() else [None])
@pytest.mark.parametrize("target", ["largest", "smallest", "last"])
def test_token_statistics_at_the_full_vocabulary(name, target):
    z = hard_logits()[name][None].float()
    at = {
        "largest": z.argmax(-1),
        "smallest": z.argmin(-1),
        "last": torch.tensor([CONFIG.vocab_size - 1], device="cuda"),
    }
    nll, entropy = fused_statistics.token_statistics(z, at[target], 20)
    exact = z.double()
    truth = torch.logsumexp(exact, -1) - exact[0, at[target]]
    plain = torch.logsumexp(z, -1) - z[0, at[target]]
    assert abs(nll - truth) <= 2 * abs(plain - truth) + 4e-7 * max(1, truth)
    top = exact.topk(20).values.log_softmax(-1)
    assert abs(entropy - -(top.exp() * top).sum() / math.log(20)) < 1e-6


def test_rounding_logits_to_bfloat16_would_not_do():
    """Why logits are float32: the error of p after rounding them is a thousand times the kernel's."""
    z = normal(64, CONFIG.vocab_size, std=4.0, dtype=torch.float32)
    target = z.argmax(-1)
    truth = (z.double().gather(1, target[:, None])[:, 0] - torch.logsumexp(z.double(), -1)).exp()
    ours, rounded = ((-fused_statistics.token_statistics(x, target, 20)[0]).exp() for x in (z, z.bfloat16().float()))
    assert (ours - truth).abs().max() < 1e-6 and (rounded - truth).abs().max() > 1e-3


def test_logits_and_statistics_at_full_shape():
    """As a pass computes them, against float64 of the same bfloat16 inputs: what error there is comes from the product."""
    hidden, head = normal(333, CONFIG.hidden_size, seed=1), normal(CONFIG.vocab_size, CONFIG.hidden_size, std=0.02)
    targets = torch.randint(CONFIG.vocab_size, (333,), device="cuda")
    logits = statistics.logits_of(hidden, head)
    nll, entropy = fused_statistics.token_statistics(logits, targets, 20)
    exact = torch.cat([h.double() @ head.double().T for h in hidden.split(64)])
    assert (logits - exact).abs().max() < 1e-4
    for z, error in ((logits.double(), 4e-6), (exact, 5e-5)):
        assert (nll - torch.logsumexp(z, -1) + z.gather(1, targets[:, None])[:, 0]).abs().max() < error
        top = z.topk(20).values.log_softmax(-1)
        assert (entropy - -(top.exp() * top).sum(-1) / math.log(20)).abs().max() < error


def test_experts_at_full_shape():
    """Against float64, expert by expert; allowed half as much error again as the same in bfloat16, one by one."""
    tokens, e, h, i = 777, CONFIG.num_local_experts, CONFIG.hidden_size, CONFIG.intermediate_size
    with torch.device("meta"):
        module = GptOssExperts(CONFIG)
    state = {"gate_up_proj": normal(e, 2 * i, h, std=0.02), "down_proj": normal(e, h, i, std=0.02, seed=1)}
    state = {name: w.transpose(1, 2) for name, w in state.items()}
    module.load_state_dict(
        state | {"gate_up_proj_bias": normal(e, 2 * i), "down_proj_bias": normal(e, h, seed=2)}, assign=True
    )
    x = normal(tokens, h, seed=3)
    ids = torch.rand(tokens, e - 3, device="cuda").topk(4).indices + 1  # experts 0, 30 and 31 get no token
    gates = torch.rand(tokens, 4, device="cuda").softmax(-1).bfloat16()
    between = experts.Between.of(expert_activation, expert_combination)
    found = experts.grouped(module, x, ids, gates, True, between)
    plain = experts.by_expert(module, x, ids, gates, True)
    outputs = torch.zeros(tokens, 4, h, device="cuda", dtype=torch.float64)
    for j in range(e):
        token, place = (ids == j).nonzero(as_tuple=True)
        gate_up = x[token].double() @ module.gate_up_proj[j].double() + module.gate_up_proj_bias[j].double()
        gate, up = gate_up[:, ::2].clamp(max=7), gate_up[:, 1::2].clamp(-7, 7)
        y = ((up + 1) * gate * torch.sigmoid(1.702 * gate)) @ module.down_proj[j].double()
        outputs[token, place] = y + module.down_proj_bias[j].double()
    truth = ((outputs * gates.double()[..., None]).sum(1), outputs.norm(dim=-1), outputs.abs().amax(-1))
    for ours, theirs, exact in zip(found, plain, truth, strict=True):
        assert relative_error(ours, exact) <= 1.5 * relative_error(theirs, exact) + 1e-6


def qkv_shapes(batch, length):
    """Queries, keys, values and sinks."""
    return (batch, length, 64, 64), (batch, length, 8, 64), (batch, length, 8, 64), (64,)


@pytest.mark.parametrize("window", [None, 128])
def test_attention_at_131072_tokens(window):
    """Rows spread over the sequence against float64; no S x S matrix is ever held: the peak stays near the inputs."""
    from eaftlib.kernels.fused.attention import attention

    length = 131072
    q, k, v, sinks = (normal(*s, seed=i) for i, s in enumerate(qkv_shapes(1, length)))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = attention(q, k, v, sinks, 0.125, window or length)
    assert torch.cuda.max_memory_allocated() - before <= 1.1 * found.nbytes
    for row in (0, 1, 127, 128, 129, 65535, 65536, 100001, length - 1):
        first = 0 if window is None else max(0, row - window + 1)
        keys = k[0, first : row + 1].double().repeat_interleave(8, dim=1)
        values = v[0, first : row + 1].double().repeat_interleave(8, dim=1)
        logits = torch.einsum("hd,shd->hs", q[0, row].double(), keys) * 0.125
        p = torch.cat([logits, sinks.double()[:, None]], dim=1).softmax(-1)[:, :-1]
        assert relative_error(found[0, row], torch.einsum("hs,shd->hd", p, values)) < 5e-3


@pytest.mark.parametrize("window", [None, 128])
def test_fused_attention_is_as_exact_as_pytorchs(window):
    from eaftlib.kernels.fused.attention import attention

    q, k, v, sinks = (normal(*s, seed=i) for i, s in enumerate(qkv_shapes(2, 1111)))
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    truth = attention_with_sinks(
        None, *(x.double() for x in heads_first), None, 0.125, sliding_window=window, s_aux=sinks.double()
    )[0]
    plain = attention_with_sinks(None, *heads_first, None, 0.125, sliding_window=window, s_aux=sinks)[0]
    ours = attention(q, k, v, sinks, 0.125, window or 1111)
    assert relative_error(ours, truth) <= 1.2 * relative_error(plain, truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_decode_at_full_shape_is_bit_equal_to_the_cpu(dtype):
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (2, 5760, 90, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 140, (2, 5760, 90), dtype=torch.uint8, generator=generator)
    found = fused_mxfp4.decode(blocks.cuda(), scales.cuda(), dtype)
    assert torch.equal(found.cpu(), mxfp4.decode(blocks, scales, dtype))


# How the demo model is run


@pytest.fixture(scope="module")
def demo():
    return Checkpoint(str(DEMO / "model"))


@pytest.fixture(scope="module")
def demo_blocks(demo):
    return pack_blocks(
        PackSource(str(DEMO / "packs")),
        UNION,
        demo.tokenizer,
        demo.family.completion_spans,
        seq_len=512,
        num_blocks=24,
        rows="eval",
    )


def most_of(checkpoint):
    keep = np.ones((checkpoint.num_layers, checkpoint.num_experts), bool)
    keep[:, 5::8] = False
    return keep


def run(checkpoint, blocks, dtype, limit=None, keep_sets=None):
    placement = replace(devices.place("cuda", dtype), max_bytes=limit)
    opened = Weights(checkpoint, placement)
    return forward.score(opened, blocks, keep_sets=keep_sets or [None, most_of(checkpoint)], progress=False), opened


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gpu_and_cpu_agree(demo, demo_blocks, dtype):
    keep_sets = [None, most_of(demo)]
    cpu = Weights(demo, devices.place("cpu", "float32"))
    expected = forward.score(cpu, demo_blocks, keep_sets=keep_sets, progress=False).variants
    found = run(demo, demo_blocks, dtype)[0].variants
    for a, b in zip(found, expected, strict=True):
        if dtype == "float32":
            np.testing.assert_allclose(a.nll, b.nll, rtol=1e-3, atol=1e-3)
            np.testing.assert_allclose(a.entropy, b.entropy, atol=1e-3)
        assert np.exp(a.nll.mean()) == pytest.approx(np.exp(b.nll.mean()), rel=0.005)
        assert a.kl_to_base.mean() == pytest.approx(b.kl_to_base.mean(), rel=0.02, abs=1e-4)
        assert a.same_top1.mean() == pytest.approx(b.same_top1.mean(), abs=0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("waiting", ["on the device", "in host memory"])
def test_streamed_equals_resident_token_by_token(demo, demo_blocks, monkeypatch, dtype, waiting):
    monkeypatch.setitem(traversal.MICRO_BATCH_TOKENS, "cuda", 5 * 512)  # 5 micro-batches, the last one smaller
    expected, opened = run(demo, demo_blocks, dtype)
    assert opened.resident
    monkeypatch.setattr(weights, "RESIDENT_SHARE", 0.0)
    if waiting == "in host memory":
        monkeypatch.setattr(traversal, "DEVICE_SHARE", 0.0)
    found, opened = run(demo, demo_blocks, dtype)
    assert not opened.resident
    for a, b in zip(found.variants, expected.variants, strict=True):
        np.testing.assert_array_equal(a.nll, b.nll)
        np.testing.assert_array_equal(a.entropy, b.entropy)
        np.testing.assert_array_equal(a.kl_to_base, b.kl_to_base)


def test_recording_experts_changes_nothing_and_agrees_with_the_cpu(demo, demo_blocks):
    gpu = Weights(demo, devices.place("cuda", "float32"))
    plain = forward.score(gpu, demo_blocks, progress=False)
    found = forward.score(gpu, demo_blocks, record_experts=True, progress=False)
    np.testing.assert_array_equal(plain.variants[0].nll, found.variants[0].nll)
    cpu = Weights(demo, devices.place("cpu", "float32"))
    expected = forward.score(cpu, demo_blocks, record_experts=True, progress=False).experts
    same = found.experts.expert == expected.expert
    assert same.float().mean() > 0.9999  # a tie between router logits may fall either way
    for name in ("gate", "norm", "peak"):
        a, b = getattr(found.experts, name)[same], getattr(expected, name)[same]
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4)


def test_bfloat16_records_what_float32_records(demo, demo_blocks):
    """Sums over tokens, as criteria take them: the kernels measure the pairs they claim to."""
    sums = []
    for dtype in ("float32", "bfloat16"):
        opened = Weights(demo, devices.place("cuda", dtype))
        trace = forward.score(opened, demo_blocks, record_experts=True, progress=False).experts
        total = torch.zeros(demo.num_layers, demo.num_experts, dtype=torch.float64)
        mass = (trace.gate * trace.norm).double().flatten(1)
        sums.append(total.scatter_add_(1, trace.expert.long().flatten(1), mass))
    assert relative_error(sums[1], sums[0]) < 0.02


@pytest.mark.parametrize("share", [weights.RESIDENT_SHARE, 0.0], ids=["resident", "streamed"])
def test_too_little_memory_halves_the_micro_batch_and_goes_on(demo, demo_blocks, monkeypatch, share):
    expected, _ = run(demo, demo_blocks, "bfloat16")
    monkeypatch.setitem(traversal.MICRO_BATCH_TOKENS, "cuda", 24 * 512)
    monkeypatch.setattr(weights, "RESIDENT_SHARE", share)
    for extra in range(200, 40, -20):  # MB; the first limit that is too low for all blocks at once
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        limit = torch.cuda.memory_reserved() + extra * 1_000_000
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            found, opened = run(demo, demo_blocks, "bfloat16", limit)
        if warned:
            break
    assert re.search(r"ran out of memory: going on with \d+ blocks of 512", str(warned[0].message))
    assert opened.resident == (share > 0) and torch.cuda.max_memory_reserved() <= limit
    for a, b in zip(found.variants, expected.variants, strict=True):
        assert np.abs(a.nll - b.nll).mean() < 0.02  # other micro-batches, other rounding
    devices.take(devices.place("cuda"))


def test_verdicts_on_the_gpu_are_those_on_the_cpu(demo, tmp_path):
    pytest.importorskip("pydantic")
    from eaftlib.evaluation import evaluate as evaluation
    from eaftlib.evaluation import gates, results
    from eaftlib.pruning.criteria import expert_sums
    from eaftlib.pruning.keepsets import from_ranking
    from eaftlib.pruning.ranking import ranking_of, write_ranking

    source = PackSource(str(DEMO / "packs"))
    cpu = devices.place("cpu", "float32")
    gpu = devices.place("cuda")
    calibration = pack_blocks(source, UNION, demo.tokenizer, completion_spans, seq_len=512, num_blocks=16, rows="calib")
    trace, _ = record(demo, calibration, gpu, progress=False)
    sums = expert_sums(trace, np.ones(len(trace.nll)))
    write_ranking(tmp_path, ranking_of(trace, sums, ["reap_mass"], settings={}, seed=0), sums)
    ranking = str(tmp_path / "ranking.json")
    keep_sets = {"base": None} | {
        f"keep-{n}": from_ranking(demo, ranking=ranking, criterion="reap_mass", keep_n=n, multiple_of=2)
        for n in (30, 16)
    }
    verdicts, ppl = [], []
    for name, placement in (("cpu", cpu), ("gpu", gpu)):
        written = evaluation.evaluate(
            demo, source, placement, keep_sets, seq_lens=[1024, 2048], num_blocks=12, only=[UNION], rows="eval",
            out_dir=tmp_path / name, progress=False,
        )  # fmt: skip
        base, *candidates = (results.read(path) for path in written)
        limits = gates.read_gates(ROOT / "params/gates/near-lossless-v1.json")
        verdicts.append([gates.judge(c, base, limits).status for c in candidates])
        ppl.append([e["model"]["ppl"] for r in (base, *candidates) for e in r.entries.values()])
    assert verdicts[0] == verdicts[1] and verdicts[0][-1] == gates.FAIL
    np.testing.assert_allclose(ppl[1], ppl[0], rtol=0.005)


def test_float16_errs_less_than_bfloat16_and_as_on_a_cpu(demo, demo_blocks):
    """Against float32 on the same GPU; on a CPU the same operands are rounded, and products are float32's."""
    nll = {dtype: run(demo, demo_blocks, dtype)[0].variants[0].nll for dtype in ("float32", "bfloat16", "float16")}
    on_cpu = forward.score(Weights(demo, devices.place("cpu", "float16")), demo_blocks, progress=False).variants[0].nll
    errors = {dtype: float(np.sqrt(np.mean((nll[dtype] - nll["float32"]) ** 2))) for dtype in ("bfloat16", "float16")}
    assert errors["float16"] < 0.25 * errors["bfloat16"], errors
    assert float(np.sqrt(np.mean((nll["float16"] - on_cpu) ** 2))) < 2 * errors["float16"] + 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_plain_backend_can_be_forced_and_agrees(demo, demo_blocks, dtype):
    fused, opened = run(demo, demo_blocks, dtype)
    assert opened.backend.name == ("turing" if dtype == "float16" else "fused")
    opened = Weights(demo, devices.place("cuda", dtype, backend="plain"))
    assert opened.backend.name == "plain"
    plain = forward.score(opened, demo_blocks, keep_sets=[None, most_of(demo)], progress=False)
    for a, b in zip(fused.variants, plain.variants, strict=True):
        if dtype == "float32":
            np.testing.assert_allclose(a.nll, b.nll, rtol=1e-3, atol=1e-3)
        assert np.exp(a.nll.mean()) == pytest.approx(np.exp(b.nll.mean()), rel=0.001 if dtype == "float16" else 0.005)


@pytest.mark.parametrize("share", [weights.RESIDENT_SHARE, 0.0], ids=["resident", "streamed"])
def test_a_killed_ranking_goes_on_with_the_same_values(demo, demo_blocks, monkeypatch, tmp_path, share):
    """What experts did is copied while the GPU computes on: a part that is written must have waited for it."""
    monkeypatch.setattr(journal, "SECONDS", 0.0)
    monkeypatch.setattr(weights, "RESIDENT_SHARE", share)
    monkeypatch.setitem(traversal.MICRO_BATCH_TOKENS, "cuda", 2 * 512)
    monkeypatch.setattr(traversal, "WAVE_TOKENS", 4 * 512)
    placement, add, parts = devices.place("cuda"), journal.Journal.add, []
    whole, _ = record(demo, demo_blocks, placement, progress=False)

    def killed(self, done, observers):
        add(self, done, observers)
        parts.append(done)
        if len(parts) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(journal.Journal, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        record(demo, demo_blocks, placement, out_dir=tmp_path, progress=False)
    found, _ = record(demo, demo_blocks, placement, out_dir=tmp_path, progress=False)
    for name in ("nll", "entropy", "expert", "gate", "norm", "peak"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))


def gradients(demo, blocks, placement):
    """Of the summed NLL of kept tokens, for routers, norms, biases and attention of a pruned demo model."""
    opened = Weights(demo, placement, training=True)
    parts = ("router", "_bias", "norm", "self_attn")
    names = [name for name in demo.names if any(part in name for part in parts)]
    changed = {n: demo.tensor(n).to(opened.device, torch.float32).requires_grad_() for n in names}
    tokens, kept = (torch.from_numpy(x).to(opened.device) for x in (blocks.tokens, blocks.kept))

    def loss(ids, hidden):
        ids = ids.to(opened.device)
        wanted = kept[ids][:, 1:]
        logits = hidden[-1][:, :-1][wanted] @ opened.lm_head.to(hidden[-1].dtype).T
        return torch.nn.functional.cross_entropy(logits.float(), tokens[ids][:, 1:][wanted].long(), reduction="sum")

    for _ in Traversal(opened, blocks, [Variant(opened, most_of(demo), changed)]).backward(loss):
        pass
    return {name: value.grad.cpu() for name, value in changed.items()}, opened


@pytest.mark.parametrize("waiting", ["on the device", "in host memory"])
def test_gradients_streamed_are_those_of_resident_layers_and_of_the_cpu(demo, demo_blocks, monkeypatch, waiting):
    with torch.inference_mode(False):
        few = replace(demo_blocks, tokens=demo_blocks.tokens[:6], kept=demo_blocks.kept[:6])
        monkeypatch.setitem(traversal.TRAINING_VALUES, "cuda", 2 * 512 * 128)
        resident, opened = gradients(demo, few, devices.place("cuda", "float32"))
        assert opened.resident
        on_cpu, _ = gradients(demo, few, devices.place("cpu"))
        monkeypatch.setattr(weights, "RESIDENT_SHARE", 0.0)
        if waiting == "in host memory":
            monkeypatch.setattr(traversal, "DEVICE_SHARE", 0.0)
        streamed, opened = gradients(demo, few, devices.place("cuda", "float32"))
        assert not opened.resident
    for name, expected in resident.items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(streamed[name], expected, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, n=name: n + m)
        assert relative_error(expected, on_cpu[name].double()) < 2e-2, name


def test_gradients_in_bfloat16_err_no_more_with_fused_kernels(demo, demo_blocks):
    """Against float32 on the CPU; PyTorch alone, an expert at a time, is what bfloat16 allows."""
    with torch.inference_mode(False):
        few = replace(demo_blocks, tokens=demo_blocks.tokens[:6], kept=demo_blocks.kept[:6])
        truth, _ = gradients(demo, few, devices.place("cpu"))
        found = {b: gradients(demo, few, devices.place("cuda", "bfloat16", backend=b)) for b in ("fused", "plain")}
    assert found["fused"][1].backend.experts != found["plain"][1].backend.experts
    flat = {b: torch.cat([g.flatten() for g in grads.values()]) for b, (grads, _) in found.items()}
    exact = torch.cat([truth[name].flatten() for name in found["fused"][0]]).double()
    errors = {b: relative_error(g, exact) for b, g in flat.items()}
    assert errors["fused"] < max(1.25 * errors["plain"], 0.02), errors
