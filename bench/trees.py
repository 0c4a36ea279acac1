"""Two checkouts of this project against each other, in turn: on one GPU at gpt-oss-20b's shape, else the demo model.

    python bench/trees.py OLD NEW [--checkpoint FOLDER] [--out FOLDER]

A process each time (old, new, old, new), since both do not fit beside each other: weights resident, then scoring, ranking
and token statistics; and a pass within 16 GB. On a CPU scoring and ranking. Ratios are of medians over all repeats.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

device = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS, REPEATS = {"cuda": 2, "cpu": 10}, {"cuda": 5, "cpu": 3}  # a CPU that others use, too, needs many turns
WORKER = """
import importlib, json, sys, time
import numpy as np, torch

def module(*names):
    for name in names:
        try:
            return importlib.import_module("eaftlib." + name)
        except ModuleNotFoundError:
            pass

placement, weights = module("devices", "engine.placement"), module("weights", "engine.weights")
forward, packs = module("forward", "engine.forward"), module("packs", "text.packs")
checkpoint, kernel = module("checkpoint", "model.checkpoint"), module("kernels.token_statistics")
fused = module("kernels.fused.token_statistics") if torch.cuda.is_available() else None
folder, mode, repeats = sys.argv[1], sys.argv[2], int(sys.argv[3])
opened = checkpoint.Checkpoint(folder)

def blocks(count, length):
    tokens = np.random.default_rng(0).integers(0, opened.config.vocab_size, (count, length)).astype(np.int32)
    kept = np.ones((count, length), bool)
    kept[:, 0] = False
    return packs.Blocks("random", "all", tokens, kept, count, "")

found = {}
wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
def rate(name, amount, run, repeats=repeats):
    run()
    for _ in range(repeats):
        wait()
        started = time.perf_counter()
        run()
        wait()
        found.setdefault(name, []).append(amount / (time.perf_counter() - started))

if mode == "resident":
    loaded = weights.Weights(opened, placement.place("cuda"))
    text = blocks(64, 1024)
    keep = np.ones((opened.num_layers, opened.num_experts), bool)
    keep[:, ::2] = False
    first = forward.score(loaded, text, progress=False)
    rate("scoring, 64 x 1,024", text.tokens.size, lambda: forward.score(loaded, text, progress=False))
    rate("ranking, 64 x 1,024", text.tokens.size,
         lambda: forward.score(loaded, text, record_experts=True, progress=False))
    few = blocks(16, 1024)
    rate("whole model and half its experts, 16 x 1,024", 2 * few.tokens.size,
         lambda: forward.score(loaded, few, keep_sets=[None, keep], progress=False))
    with torch.inference_mode():
        hidden = torch.randn(16384, opened.config.hidden_size, device="cuda", dtype=torch.bfloat16)
        targets = torch.randint(opened.config.vocab_size, (16384,), device="cuda")
        rows = kernel.slice_rows(opened.config.vocab_size, hidden.device)
        def step():
            for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
                fused.token_statistics(kernel.logits_of(h, loaded.lm_head), t, 20)
        rate("token statistics, 16,384 tokens", 16384, step, 10)
    found["nll"] = [float(first.variants[0].nll.sum(dtype=np.float64))]
elif mode == "cpu":
    loaded, text = weights.Weights(opened, placement.place("cpu")), blocks(8, 1024)
    rate("scoring, 8 x 1,024", text.tokens.size, lambda: forward.score(loaded, text, progress=False))
    rate("ranking, 8 x 1,024", text.tokens.size,
         lambda: forward.score(loaded, text, record_experts=True, progress=False))
    found["nll"] = [float(forward.score(loaded, text, progress=False).variants[0].nll.sum(dtype=np.float64))]
else:
    loaded = weights.Weights(opened, placement.place("cuda", max_gpu_memory=16.0))
    assert not loaded.resident
    run = forward.score(loaded, blocks(int(mode), 2048), progress=False)
    found[f"16 GB, {mode} x 2,048"] = [run.tokens_per_second]
    found["nll"] = [float(run.variants[0].nll.sum(dtype=np.float64))]
    found["peak_gb"] = [run.peak_device_bytes / 1e9]
print(json.dumps(found))
"""


def measure(tree: Path, folder: str, mode: str) -> dict[str, list[float]]:
    command = [sys.executable, "-c", WORKER, folder, mode, str(REPEATS[device])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(tree), os.environ.get("PYTHONPATH")]))}
    done = subprocess.run(command, env=environment, cwd=tree, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="else outputs/bench/20b on a GPU, demo/model on a CPU")
    parser.add_argument("--blocks", default="256", help="of 2,048 tokens in the pass within 16 GB")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    args = parser.parse_args()
    trees = {"old": args.old.resolve(), "new": args.new.resolve()}
    found: dict[str, dict[str, list[float]]] = {}
    checkpoint = args.checkpoint or Path("outputs/bench/20b" if device == "cuda" else "demo/model")
    for mode in ("resident", args.blocks) if device == "cuda" else ("cpu",):
        for _ in range(ROUNDS[device]):
            for label, tree in trees.items():
                for name, values in measure(tree, str(checkpoint.resolve()), mode).items():
                    found.setdefault(f"{name} ({mode})" if name == "nll" else name, {}).setdefault(label, []).extend(
                        values
                    )
                print(mode, label, flush=True)
    sys.path.insert(0, str(trees["new"]))
    from harness import print_table, save

    rows = []
    for name, values in found.items():
        first = statistics.median(values["old"])
        for label, numbers in values.items():
            middle = statistics.median(numbers)
            spread = {"low": min(numbers), "high": max(numbers)}
            rows.append(
                {"comparison": name, "variant": label, "median": middle, "ratio": middle / first, "unit": "", **spread}
            )
    print_table(rows)
    print(f"\nwrote {save(rows, args.out, '-trees')}")


if __name__ == "__main__":
    main()
