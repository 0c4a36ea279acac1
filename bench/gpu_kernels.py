"""The kernels at gpt-oss-20b's shape, against what one would use without them."""

import importlib.util
from functools import partial

import torch
import torch.nn.functional as F
from harness import side_by_side
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts, eager_attention_forward

from eaftlib.engine import experts as measured
from eaftlib.engine.attention import attention_with_sinks
from eaftlib.kernels import divergence as plain_divergence
from eaftlib.kernels import mxfp4
from eaftlib.kernels import token_statistics as statistics
from eaftlib.kernels.fused import divergence, expert_activation, expert_combination
from eaftlib.kernels.fused import token_statistics as fused_statistics
from eaftlib.kernels.fused.attention import attention
from eaftlib.kernels.fused.mxfp4 import decode

CONFIG = GptOssConfig()
BF16 = torch.bfloat16


def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=BF16) * std


@torch.inference_mode()
def compare_statistics(tokens: int = 16384) -> list[dict]:
    """Hidden states to NLL and top-20 entropy, in slices; the bare products first."""
    hidden, head = normal(tokens, CONFIG.hidden_size), normal(CONFIG.vocab_size, CONFIG.hidden_size, std=0.02)
    targets = torch.randint(CONFIG.vocab_size, (tokens,), device="cuda")
    rows = statistics.slice_rows(CONFIG.vocab_size, hidden.device)

    def plain(h, t):
        logits = (h @ head.T).float()
        top = logits.topk(20).values.log_softmax(-1)
        return F.cross_entropy(logits, t, reduction="none"), -(top.exp() * top).sum(-1)

    def ours(h, t):
        return fused_statistics.token_statistics(statistics.logits_of(h, head), t, 20)

    def sliced(step, size=rows):
        return lambda: [step(h, t) for h, t in zip(hidden.split(size), targets.split(size), strict=True)]

    runs = {
        "product alone, bf16 logits": sliced(lambda h, t: h @ head.T),
        "product alone, float32 logits": sliced(lambda h, t: statistics.logits_of(h, head)),
        "plain PyTorch, 4,096 tokens at once": sliced(plain, 4096),
        "eaftlib: NLL and top-20 entropy": sliced(ours),
    }
    if importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        runs["cut-cross-entropy, NLL only"] = lambda: linear_cross_entropy(hidden, head, targets, reduction="none")
    return side_by_side("token statistics, vocabulary 201,088", runs, tokens, "tokens/s")


@torch.inference_mode()
def compare_divergence(tokens: int = 1989, others: int = 4) -> list[dict]:
    """KL and equal arg-max of some pruned models' logits to the whole model's, one slice of tokens."""
    base = torch.randn(tokens, CONFIG.vocab_size, device="cuda") * 3
    rest = [base + torch.randn_like(base) for _ in range(others)]

    def against(reference):
        def run():
            whole = reference(base)
            return [whole.compare(logits) for logits in rest]

        return run

    runs = {"plain PyTorch": against(plain_divergence.Reference), "eaftlib": against(divergence.Reference)}
    return side_by_side(
        f"divergence of {others} models, vocabulary 201,088", runs, tokens * others, "tokens/s", inner=3
    )


@torch.inference_mode()
def compare_experts(tokens: int = 16384) -> list[dict]:
    """One layer's 32 experts, top 4, routing at random."""
    with torch.device("meta"):
        experts = GptOssExperts(CONFIG)
    e, h, i = CONFIG.num_local_experts, CONFIG.hidden_size, CONFIG.intermediate_size
    weights = {"gate_up_proj": normal(e, 2 * i, h, std=0.02), "down_proj": normal(e, h, i, std=0.02)}
    state = {name: w.transpose(1, 2) for name, w in weights.items()}
    state |= {"gate_up_proj_bias": normal(e, 2 * i), "down_proj_bias": normal(e, h)}
    experts.load_state_dict(state, assign=True)
    x, ids = normal(tokens, h), torch.rand(tokens, e, device="cuda").topk(4).indices
    gates = torch.rand(tokens, 4, device="cuda").softmax(-1).to(BF16)
    trace = measured.ExpertTrace.empty(1, tokens, 4, e, x.device)
    probe = measured.ExpertProbe(trace, 0, 0, torch.arange(tokens, device="cuda"))

    fused = partial(measured.grouped, between=measured.Between.of(expert_activation, expert_combination))
    grouped = measured.measured(fused)

    def stock(implementation):
        def run():
            experts.config._experts_implementation = implementation
            return experts(x, ids, gates)

        return run

    def ours(probe):
        def run():
            experts.probe = probe
            return grouped(experts, x, ids, gates)

        return run

    runs = {
        "transformers, eager": stock("eager"),
        "transformers, grouped_mm": stock("grouped_mm"),
        "eaftlib": ours(None),
        "eaftlib, measuring every routed pair": ours(probe),
    }
    experts.config = CONFIG
    return side_by_side(f"experts of one layer, {tokens:,} tokens", runs, tokens, "tokens/s", inner=3)


@torch.inference_mode()
def compare_attention() -> list[dict]:
    rows = []
    for blocks, length, window in ((8, 2048, None), (8, 2048, 128), (1, 131072, None), (1, 131072, 128)):
        q, k, v = normal(blocks, length, 64, 64), normal(blocks, length, 8, 64), normal(blocks, length, 8, 64)
        sinks = normal(64)
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        runs = {
            "sinks as keys, PyTorch's attention": lambda h=heads_first, s=sinks, w=window: attention_with_sinks(
                None, *h, None, 0.125, sliding_window=w, s_aux=s
            ),
            "eaftlib": lambda q=q, k=k, v=v, s=sinks, w=window: attention(q, k, v, s, 0.125, w or q.shape[1]),
        }
        if length <= 2048:
            runs = {"transformers, eager with a mask": eager_attention(heads_first, sinks, window)} | runs
        kind = "full" if window is None else f"sliding {window}"
        rows += side_by_side(f"attention, {blocks} x {length:,}, {kind}", runs, blocks * length, "tokens/s")
        torch.cuda.empty_cache()
    return rows


def eager_attention(heads_first, sinks, window):
    length = heads_first[0].shape[2]
    i = torch.arange(length, device="cuda")
    seen = (i[:, None] >= i) & (i[:, None] - i < (window or length))
    mask = torch.zeros(length, length, device="cuda", dtype=BF16).masked_fill(~seen, float("-inf"))[None, None]
    module = torch.nn.Module()
    module.num_key_value_groups, module.sinks = 8, sinks
    return lambda: eager_attention_forward(module, *heads_first, mask, 0.125)


@torch.inference_mode()
def compare_decode() -> list[dict]:
    """One layer's first projection; the copy shows what the memory allows."""
    shape = (CONFIG.num_local_experts, 2 * CONFIG.intermediate_size, CONFIG.hidden_size // 32)
    blocks = torch.randint(256, (*shape, 16), dtype=torch.uint8, device="cuda")
    scales = torch.randint(118, 121, shape, dtype=torch.uint8, device="cuda")
    moved = blocks.nbytes + scales.nbytes + scales.numel() * 32 * BF16.itemsize
    source, target = torch.empty(2, moved // 2, dtype=torch.uint8, device="cuda").unbind()

    runs = {
        "device copy of as many bytes": lambda: target.copy_(source),
        "plain PyTorch": lambda: mxfp4.decode(blocks, scales, BF16),
        "eaftlib": lambda: decode(blocks, scales, BF16),
    }
    return side_by_side("MXFP4 decode to bf16", runs, moved / 1e9, "GB/s", inner=5)
