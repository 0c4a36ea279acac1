"""Comparisons that need no GPU: evaluating the demo model, and pruning."""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import ROOT, side_by_side
from transformers import AutoModelForCausalLM

from eaftlib.engine import forward
from eaftlib.engine import placement as devices
from eaftlib.engine.weights import Weights
from eaftlib.model.checkpoint import Checkpoint
from eaftlib.pruning import slicing
from eaftlib.pruning.keepsets import KeepSet
from eaftlib.text.packs import UNION, Blocks, PackSource, pack_blocks


def plain_loop(model, blocks: Blocks) -> torch.Tensor:
    """What one would write without this library: full logits of every block, then NLL and top-20 entropy."""
    nll = []
    with torch.inference_mode():
        for tokens, kept in zip(torch.from_numpy(blocks.tokens).long(), torch.from_numpy(blocks.kept), strict=True):
            logits = model(tokens[None].to(model.device)).logits[0, :-1].float()
            top = F.softmax(logits.topk(20).values, dim=-1)
            _ = -(top * top.log()).sum(-1)
            nll.append(F.cross_entropy(logits, tokens[1:].to(model.device), reduction="none")[kept[1:]])
    return torch.cat(nll)


def compare_evaluation() -> list[dict]:
    checkpoint = Checkpoint(str(ROOT / "demo/model"))
    placement = devices.place("cpu")
    source = PackSource(str(ROOT / "demo/packs"))
    model = AutoModelForCausalLM.from_pretrained(ROOT / "demo/model", dtype=placement.precision.products).to(
        placement.device
    )
    weights, spans = Weights(checkpoint, placement), checkpoint.family.completion_spans
    rows = []
    for seq_len, num_blocks in ((1024, 8), (2048, 4)):
        blocks = pack_blocks(
            source, UNION, checkpoint.tokenizer, spans, seq_len=seq_len, num_blocks=num_blocks, rows="eval"
        )
        runs = {
            "transformers, eager experts": lambda blocks=blocks: plain_loop(with_experts(model, "eager"), blocks),
            "transformers, grouped_mm experts": lambda blocks=blocks: plain_loop(
                with_experts(model, "grouped_mm"), blocks
            ),
            "eaftlib": lambda blocks=blocks: forward.score(weights, blocks, progress=False),
        }
        rows += side_by_side(f"evaluate demo model, {seq_len} tokens", runs, blocks.tokens.size, "tokens/s")
    return rows


def with_experts(model, implementation: str):
    model.set_experts_implementation(implementation)
    return model


def compare_pruning(model: str) -> list[dict]:
    """Prune to half in a process of its own, whose peak memory is its own, against copying as many bytes."""
    folder = Path(tempfile.mkdtemp(dir=Path(model).absolute().parent))
    code = "import sys; sys.path.insert(0, 'bench'); import cpu; cpu.prune_to_half(*sys.argv[1:])"
    found = subprocess.run(
        [sys.executable, "-c", code, model, str(folder / "half")], cwd=ROOT, capture_output=True, text=True, check=True
    )
    report = json.loads(found.stdout.splitlines()[-1])
    forget(folder / "half")
    started = time.perf_counter()
    shutil.copytree(folder / "half", folder / "copy")
    subprocess.run(["sync", "-f", folder], check=True)
    copied = time.perf_counter() - started
    shutil.rmtree(folder)
    rate = {"comparison": "prune to half its experts", "unit": "MB/s"}
    megabytes = report["bytes"] / 1e6
    return [
        rate
        | {
            "variant": "copy of the kept bytes",
            "median": megabytes / copied,
            "ratio": 1.0,
            "seconds": copied,
            "peak_gb": None,
        },
        rate
        | {
            "variant": "eaftlib",
            "median": megabytes / report["seconds"],
            "ratio": copied / report["seconds"],
            "peak_gb": report["peak_rss_mb"] / 1e3,
            **report,
        },
    ]


def prune_to_half(model: str, out: str) -> None:
    checkpoint = Checkpoint(model)
    keep = slicing.keep_all(checkpoint)
    keep = KeepSet(keep.ids[:, ::2], keep.num_experts, {"criterion": "every other expert", "keep_n": keep.keep_n // 2})
    forget(checkpoint.folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    manifest = slicing.prune(checkpoint, keep, out, progress=False)
    subprocess.run(["sync", "-f", out], check=True)
    seconds = time.perf_counter() - started
    anonymous = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        json.dumps(
            {
                "seconds": seconds,
                "bytes": manifest["bytes_after"],
                "peak_rss_mb": anonymous / 1024,
                "rss_before_mb": before / 1024,
            }
        )
    )


def forget(folder: Path) -> None:
    """Drop the folder's files from the page cache, so that both sides read from the disk."""
    subprocess.run(["sync", "-f", folder], check=True)
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
