"""Whole passes at gpt-oss-20b's shape: against transformers, ranking against scoring, streamed against resident."""

import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from harness import now, side_by_side
from make_checkpoint import write_checkpoint
from torch.profiler import ProfilerActivity
from transformers import GptOssForCausalLM

from eaftlib.engine import forward
from eaftlib.engine import placement as devices
from eaftlib.engine.launch import over_gpus
from eaftlib.engine.weights import Weights
from eaftlib.model.checkpoint import Checkpoint
from eaftlib.text.packs import Blocks

PARTS = {  # a kernel belongs to the first part one of whose words its name holds
    "statistics of tokens": ("_statistics",),
    "attention": ("_attention", "_rotary"),
    "expert products": ("cutlass",),
    "other products": ("nvjet", "gemm", "cublas", "splitK"),
    "experts, between products": (
        "_activate",
        "_combine",
        "gather",
        "radix",
        "Radix",
        "sort",
        "Sort",
        "topk",
        "searchsorted",
    ),
    "copies": ("Memcpy", "Memset"),
}


def random_blocks(checkpoint: Checkpoint, count: int, length: int) -> Blocks:
    """Random tokens, all kept but the first of each block: the most work a pass can have."""
    tokens = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, (count, length)).astype(np.int32)
    kept = np.ones((count, length), bool)
    kept[:, 0] = False
    return Blocks("random", "all", tokens, kept, count, "")


@torch.inference_mode()
def stock_model(weights: Weights, experts: str, attention: str) -> GptOssForCausalLM:
    """transformers' model over the same tensors, so that both fit on one GPU."""
    config = type(weights.checkpoint.config).from_dict(weights.checkpoint.config.to_dict())
    config._attn_implementation, config._experts_implementation = attention, experts
    with torch.device("meta"):
        model = GptOssForCausalLM(config).to(weights.precision.products)
    for index, layer in weights.layers():
        model.model.layers[index].load_state_dict(layer.state_dict(), assign=True)
    model.model.rotary_emb = weights.rotary
    model.model.norm.weight, model.lm_head.weight = weights.norm.weight, torch.nn.Parameter(weights.lm_head, False)
    model.model.embed_tokens.weight = torch.nn.Parameter(weights.embedding, False)
    return model.eval()


def plain_pass(model: GptOssForCausalLM, blocks: Blocks, batch: int, rows: int = 4096):
    """What one would write with transformers: the backbone, then logits of some thousand tokens at a time."""
    with torch.inference_mode():
        for tokens in torch.from_numpy(blocks.tokens).long().to("cuda").split(batch):
            hidden = model.model(tokens, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
            for h, t in zip(hidden.split(rows), tokens[:, 1:].flatten().split(rows), strict=True):
                logits = model.lm_head(h).float()
                top = logits.topk(20).values.log_softmax(-1)
                _ = F.cross_entropy(logits, t, reduction="none").cpu(), -(top.exp() * top).sum(-1).cpu()


def compare_passes(folder: str) -> list[dict]:
    checkpoint = Checkpoint(folder)
    weights = Weights(checkpoint, devices.place("cuda"))
    blocks = {length: random_blocks(checkpoint, 65536 // length, length) for length in (1024, 2048)}
    few = random_blocks(checkpoint, 16, 1024)
    forward.score(weights, few, progress=False)  # layers are read

    def stock(experts, attention):
        model = stock_model(weights, experts, attention)
        return lambda: plain_pass(model, few, 8)

    rows = side_by_side(
        "scoring pass, 24 layers, 8 x 1,024 at a time",
        {
            "transformers, eager experts, eager attention": stock("eager", "eager"),
            "transformers, grouped_mm, eager attention": stock("grouped_mm", "eager"),
            "eaftlib": lambda: forward.score(weights, few, progress=False),
        },
        few.tokens.size,
        "tokens/s",
        repeats=3,
    )
    rows += side_by_side(
        "eaftlib, 65,536 tokens",
        {
            "scoring, 64 x 1,024": lambda: forward.score(weights, blocks[1024], progress=False),
            "ranking, 64 x 1,024": lambda: forward.score(weights, blocks[1024], record_experts=True, progress=False),
            "scoring, 32 x 2,048": lambda: forward.score(weights, blocks[2048], progress=False),
        },
        65536,
        "tokens/s",
        repeats=3,
    )
    return rows


def compare_streamed(folder: str, gigabytes: float = 16.0, count: int = 512, length: int = 2048) -> list[dict]:
    """A million tokens with everything resident, and with no more than 16 GB of the GPU; once each, they take long."""
    checkpoint = Checkpoint(folder)
    blocks, rows = random_blocks(checkpoint, count, length), []
    passes = {}
    for label, limit in ((f"streamed, {gigabytes:g} GB", gigabytes), ("resident", None)):
        weights = Weights(checkpoint, devices.place("cuda", max_gpu_memory=limit))
        if weights.resident:
            for _ in weights.layers():
                pass
        passes[label] = found = forward.score(weights, blocks, progress=False)
        rows.append(
            {
                "comparison": f"scoring {count} x {length:,} tokens",
                "variant": label,
                "median": found.tokens_per_second,
                "unit": "tokens/s",
                "seconds": found.seconds,
                "peak_gb": found.peak_device_bytes / 1e9,
            }
        )
        del weights
        torch.cuda.empty_cache()
    rows.reverse()
    a, b = (p.variants[0].nll for p in passes.values())
    for row in rows:
        row["ratio"] = row["median"] / rows[0]["median"]
        row["largest_nll_difference"] = float(np.abs(a - b).max())
    return rows


@over_gpus
def one_pass(checkpoint: Checkpoint, blocks: Blocks, placement: devices.Placement) -> forward.Pass:
    """A pass once layers have been read and kernels compiled."""
    weights = Weights(checkpoint, placement)
    forward.score(weights, blocks, progress=False)
    return forward.score(weights, blocks, progress=False)


def compare_gpus(folder: str, count: int = 512, length: int = 2048) -> list[dict]:
    """A million tokens on one GPU, and shared by all of the machine's."""
    checkpoint = Checkpoint(folder)
    blocks = random_blocks(checkpoint, count, length)
    passes = {}
    for placement in (devices.place("cuda"), devices.place("auto")):
        passes[placement.processes] = one_pass(checkpoint, blocks, placement)
        torch.cuda.empty_cache()
    one = passes[1]
    return [
        {
            "comparison": f"scoring {count} x {length:,} tokens, resident",
            "variant": f"{gpus} GPU(s)",
            "median": found.tokens_per_second,
            "unit": "tokens/s",
            "ratio": found.tokens_per_second / one.tokens_per_second,
            "peak_gb": found.peak_device_bytes / 1e9,
            "largest_nll_difference": float(np.abs(found.variants[0].nll - one.variants[0].nll).max()),
        }
        for gpus, found in passes.items()
    ]


def profile(folder: str) -> list[dict]:
    """Share of a resident scoring pass by part; the gap is when the GPU waits."""
    checkpoint = Checkpoint(folder)
    weights = Weights(checkpoint, devices.place("cuda"))
    blocks = random_blocks(checkpoint, 64, 1024)
    for _ in range(2):
        forward.score(weights, blocks, progress=False)
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        started = now()
        forward.score(weights, blocks, progress=False)
        wall = now() - started
    parts: dict[str, float] = {}
    other: dict[str, float] = {}
    for event in profiler.key_averages():
        part = next((p for p, words in PARTS.items() if any(w in event.key for w in words)), "norms, sums and the rest")
        parts[part] = parts.get(part, 0.0) + event.self_device_time_total / 1e6
        other[event.key[:80]] = event.self_device_time_total / 1e6
    parts["gaps"] = wall - sum(parts.values())
    flop = flop_per_token(checkpoint, 1024)
    print(f"\nscoring 64 x 1,024: {65536 / wall:,.0f} tokens/s, {flop * 65536 / wall / 1e12:,.0f} TFLOP/s of products")
    table = [{"part": p, "seconds": s, "share": s / wall} for p, s in sorted(parts.items(), key=lambda x: -x[1])]
    for row in table:
        print(f"  {row['part']:<30}{row['seconds'] * 1e3:>9.1f} ms {row['share']:>7.1%}")
    top = sorted(other.items(), key=lambda x: -x[1])[:25]
    return [*table, {"wall": wall, "flop_per_token": flop, "kernels": dict(top)}]


def flop_per_token(checkpoint: Checkpoint, length: int) -> float:
    """Multiply-adds of all matrix products, twice; attention at its causal half."""
    c = checkpoint.config
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    projections = c.hidden_size * (2 * q + 2 * kv)
    experts = c.num_experts_per_tok * 3 * c.hidden_size * c.intermediate_size
    seen = sum(min(length, c.sliding_window) if t == "sliding_attention" else length / 2 for t in c.layer_types)
    return 2 * (c.num_hidden_layers * (projections + experts) + 2 * q * seen + c.hidden_size * c.vocab_size)


def layers_of_120b(folder: Path, layers: int = 2) -> dict:
    """Some layers of 120b at full width; a whole pass is estimated as 36 of them, each read while another computes."""
    if not (folder / "120b").is_dir():
        write_checkpoint(folder / "120b", "120b", layers)
    checkpoint = Checkpoint(str(folder / "120b"))
    blocks = random_blocks(checkpoint, 128, 1024)
    weights = Weights(checkpoint, devices.place("cuda"))
    started = time.perf_counter()
    for _ in weights.layers():
        pass
    read = time.perf_counter() - started
    seconds = []
    for _ in range(3):
        states = forward.score(weights, blocks, progress=False)
        seconds.append(states.seconds)
    head = _seconds_of_ends(weights, blocks)
    per_layer = (statistics.median(seconds) - head) / layers
    tokens = blocks.tokens.size
    million = 2**20 / tokens
    whole = 36 * max(read / layers, per_layer * million) + head * million
    found = {
        "layers": layers,
        "tokens": tokens,
        "seconds_per_layer": per_layer,
        "seconds_of_ends": head,
        "seconds_to_read_a_layer": read / layers,
        "layer_gb": sum(p.nbytes for p in next(weights.layers())[1].parameters()) / 1e9,
        "peak_gb": states.peak_device_bytes / 1e9,
        "layer_tokens_per_second": tokens / per_layer,
        "estimated_seconds_of_a_million_tokens": whole,
        "estimated_tokens_per_second": 2**20 / whole,
    }
    print("\n120b, " + ", ".join(f"{k} {v:,.3g}" for k, v in found.items()))
    return found


def _seconds_of_ends(weights: Weights, blocks: Blocks) -> float:
    """Embedding, final norm and token statistics: a pass over no layers."""
    layers = weights.checkpoint.config.num_hidden_layers
    kept, weights._kept = weights._kept, {}
    weights.checkpoint.config.num_hidden_layers = 0
    try:
        forward.score(weights, blocks, progress=False)
        return forward.score(weights, blocks, progress=False).seconds
    finally:
        weights._kept, weights.checkpoint.config.num_hidden_layers = kept, layers
