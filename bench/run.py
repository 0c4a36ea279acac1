"""make bench: each comparison side by side in one process, medians of interleaved runs, kept in bench/results/.

    python bench/run.py [--prune CHECKPOINT]

On a CPU: evaluation of the demo model against a plain transformers loop over full logits. With --prune, cutting that
checkpoint to half its experts against copying the kept bytes (bench/make_checkpoint.py writes one of gpt-oss-20b's shape).
"""

import argparse
import datetime
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM

from eaftlib import devices, forward, project, slicing
from eaftlib.checkpoint import Checkpoint
from eaftlib.keepsets import KeepSet
from eaftlib.packs import UNION, Blocks, PackSource, pack_blocks
from eaftlib.weights import Weights

ROOT = Path(__file__).parents[1]
REPEATS = 5


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


def compare_evaluation(device: str) -> list[dict]:
    checkpoint = Checkpoint(str(ROOT / "demo/model"))
    placement = devices.place(device)
    source = PackSource(str(ROOT / "demo/packs"))
    model = AutoModelForCausalLM.from_pretrained(ROOT / "demo/model", dtype=placement.dtype).to(placement.device)
    rows = []
    for seq_len, num_blocks in ((1024, 8), (2048, 4)):
        blocks = pack_blocks(source, UNION, checkpoint.tokenizer, seq_len=seq_len, num_blocks=num_blocks, rows="eval")
        runs = {
            "transformers, eager experts": lambda blocks=blocks: plain_loop(with_experts(model, "eager"), blocks),
            "transformers, grouped_mm experts": lambda blocks=blocks: plain_loop(
                with_experts(model, "grouped_mm"), blocks
            ),
            "eaftlib": lambda blocks=blocks: forward.score(Weights(checkpoint, placement), blocks, progress=False),
        }
        rows += side_by_side(f"evaluate demo model, {seq_len} tokens", runs, blocks.tokens.size, "tokens/s")
    return rows


def with_experts(model, implementation: str):
    model.set_experts_implementation(implementation)
    return model


def side_by_side(name: str, runs: dict, amount: int, unit: str) -> list[dict]:
    """Every variant once per round after one warm-up, so that drift hits all alike; ratios are to the first."""
    for run in runs.values():
        run()
    seconds = {label: [] for label in runs}
    for _ in range(REPEATS):
        for label, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[label].append(time.perf_counter() - started)
    first = statistics.median(next(iter(seconds.values())))
    return [
        {
            "comparison": name,
            "variant": label,
            "median": amount / statistics.median(times),
            "low": amount / max(times),
            "high": amount / min(times),
            "unit": unit,
            "ratio": first / statistics.median(times),
        }
        for label, times in seconds.items()
    ]


def compare_pruning(model: str) -> list[dict]:
    """Prune to half in a process of its own, whose peak memory is its own, against copying as many bytes."""
    folder = Path(tempfile.mkdtemp(dir=Path(model).absolute().parent))
    code = "import sys, bench.run as b; b.prune_to_half(*sys.argv[1:])"
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
        rate | {"variant": "copy of the kept bytes", "median": megabytes / copied, "ratio": 1.0, "seconds": copied},
        rate
        | {
            "variant": "eaftlib",
            "median": megabytes / report["seconds"],
            "ratio": copied / report["seconds"],
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


def device_name() -> str:
    return (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )


def print_table(rows: list[dict]) -> None:
    for row in rows:
        spread = (
            f"[{row['low']:,.0f}, {row['high']:,.0f}]"
            if "low" in row
            else f"peak memory {row.get('peak_rss_mb', 0):,.0f} MB"
        )
        print(
            f"{row['comparison']:<34}{row['variant']:<34}{row['median']:>9,.0f} {row['unit']:<9}{row['ratio']:>6.2f}x {spread}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prune", metavar="CHECKPOINT", help="measure pruning on this checkpoint only")
    args = parser.parse_args()
    rows = compare_pruning(args.prune) if args.prune else compare_evaluation("auto")
    print_table(rows)
    content = {
        "date": datetime.date.today().isoformat(),
        "device": device_name(),
        "commit": project.commit(ROOT),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "rows": rows,
    }
    kind = "".join(c if c.isalnum() else "-" for c in device_name().split(",")[0])
    (ROOT / "bench/results").mkdir(exist_ok=True)
    name = f"{content['date']}-{kind}{'-prune' if args.prune else ''}.json"
    (ROOT / "bench/results" / name).write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote bench/results/{name}")


if __name__ == "__main__":
    main()
