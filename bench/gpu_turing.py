"""A pass as Kaggle's T4 makes it, forced on this GPU within 15 GB: float16 products against bfloat16's and float32's."""

from pathlib import Path

import numpy as np
import torch
from gpu_passes import random_blocks
from torch.profiler import ProfilerActivity

from eaftlib.engine import forward
from eaftlib.engine import placement as devices
from eaftlib.engine.weights import Weights
from eaftlib.model.checkpoint import Checkpoint

GIGABYTES, LENGTH, COUNT, FEW = 15.0, 2048, 512, 32


def compare_turing(folder: str | Path, count: int = COUNT) -> list[dict]:
    """Speed and memory on a million tokens (float32: on the few), errors against float32 on the few."""
    checkpoint = Checkpoint(str(folder))
    few, many = (random_blocks(checkpoint, n, LENGTH) for n in (FEW, count))
    rows, nll = [], {}
    for dtype in ("float16", "bfloat16", "float32"):
        weights = Weights(checkpoint, devices.place("cuda", dtype, max_gpu_memory=GIGABYTES))
        short = forward.score(weights, few, progress=False)
        nll[dtype] = short.variants[0].nll.astype(np.float64)
        found = short if dtype == "float32" else forward.score(weights, many, progress=False)
        tokens = few.tokens.size if dtype == "float32" else many.tokens.size
        row = {
            "comparison": f"scoring, layers streamed, at most {GIGABYTES:g} GB",
            "variant": f"{dtype}, {weights.backend.name}, {tokens:,} tokens",
            "median": found.tokens_per_second,
            "unit": "tokens/s",
            "seconds": found.seconds,
            "peak_gb": found.peak_device_bytes / 1e9,
        }
        print(row, flush=True)
        rows.append(row)
        del weights
        torch.cuda.empty_cache()
    for row, dtype in zip(rows, nll, strict=True):
        row["ratio"] = row["median"] / rows[-1]["median"]
        error = nll[dtype] - nll["float32"]
        row["nll_rms_error"] = float(np.sqrt(np.mean(error**2)))
        row["ppl_relative_error"] = float(np.exp(nll[dtype].mean() - nll["float32"].mean()) - 1)
    return rows


def profile_turing(folder: str | Path, blocks: int = 64) -> list[dict]:
    """GPU seconds by kernel, the largest, once layers are in the page cache."""
    checkpoint = Checkpoint(str(folder))
    weights = Weights(checkpoint, devices.place("cuda", "float16", max_gpu_memory=GIGABYTES))
    text = random_blocks(checkpoint, blocks, LENGTH)
    forward.score(weights, random_blocks(checkpoint, 8, LENGTH), progress=False)
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        wall = forward.score(weights, text, progress=False).seconds
    kernels = sorted(profiler.key_averages(), key=lambda e: -e.self_device_time_total)
    table = [{"kernel": e.key[:110], "seconds": e.self_device_time_total / 1e6, "calls": e.count} for e in kernels[:30]]
    total = sum(e.self_device_time_total for e in kernels) / 1e6
    print(f"\nturing pass over {text.tokens.size:,} tokens: {wall:.2f} s, kernels and copies {total:.2f} s")
    for row in table:
        print(f"  {row['seconds']:7.4f} {row['calls']:6} {row['kernel']}")
    return [{"wall": wall, "kernels": total}, *table]
