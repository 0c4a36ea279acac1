"""make bench: each comparison side by side in one process, medians of interleaved runs, kept in bench/results/.

    python bench/run.py [--only NAME ...] [--checkpoint FOLDER] [--out FOLDER]

On a CPU: evaluation of the demo model against a plain transformers loop. On a GPU: the kernels, whole passes, streaming
and where the time goes, at gpt-oss-20b's shape with random weights (written on first use, 13.8 GB), layers of
120b's, and one GPU against all, where there are several. ``--only prune`` cuts the checkpoint to half its experts against
copying the kept bytes.
"""

import argparse
from pathlib import Path

import cpu
import gpu_kernels
import gpu_passes
import gpu_recovery
import gpu_turing
import torch
from harness import ROOT, print_table, save
from make_checkpoint import write_checkpoint

COMPARISONS = {
    "evaluate": lambda folder: (cpu.compare_evaluation(), {}),
    "prune": lambda folder: (cpu.compare_pruning(full_shape(folder)), {}),
    "statistics": lambda folder: (gpu_kernels.compare_statistics(), {}),
    "divergence": lambda folder: (gpu_kernels.compare_divergence(), {}),
    "experts": lambda folder: (gpu_kernels.compare_experts(), {}),
    "attention": lambda folder: (gpu_kernels.compare_attention(), {}),
    "decode": lambda folder: (gpu_kernels.compare_decode(), {}),
    "pass": lambda folder: (gpu_passes.compare_passes(full_shape(folder)), {}),
    "gpus": lambda folder: (gpu_passes.compare_gpus(full_shape(folder)), {}),
    "streamed": lambda folder: (gpu_passes.compare_streamed(full_shape(folder)), {}),
    "profile": lambda folder: ([], {"profile": gpu_passes.profile(full_shape(folder))}),
    "recover": lambda folder: (gpu_recovery.compare_recovery(full_shape(folder)), {}),
    "recover-gpus": lambda folder: (gpu_recovery.compare_gpus(full_shape(folder)), {}),
    "recover-profile": lambda folder: ([], {"recover-profile": gpu_recovery.profile_step(full_shape(folder))}),
    "turing": lambda folder: (gpu_turing.compare_turing(full_shape(folder)), {}),
    "turing-profile": lambda folder: ([], {"turing-profile": gpu_turing.profile_turing(full_shape(folder))}),
    "120b": lambda folder: ([], {"120b": gpu_passes.layers_of_120b(folder)}),
}
ON_CPU = ["evaluate"]
ON_GPU = ["statistics", "divergence", "pass", "profile", "streamed", "recover", "recover-profile", "120b"]
ON_GPU += ["turing", "turing-profile", "experts", "attention", "decode"]
ON_GPUS = [*ON_GPU, "gpus", "recover-gpus"]


def full_shape(folder: Path) -> str:
    checkpoint = folder / "20b"
    if not checkpoint.is_dir():
        write_checkpoint(checkpoint, "20b")
    return str(checkpoint)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=COMPARISONS, metavar="NAME", help=", ".join(COMPARISONS))
    parser.add_argument(
        "--checkpoints", type=Path, default=ROOT / "outputs/bench", help="where random weights are kept"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results")
    args = parser.parse_args()
    rows, more = [], {}
    chosen = args.only or (ON_CPU, ON_GPU, ON_GPUS)[min(torch.cuda.device_count(), 2)]
    for name in chosen:
        found, extra = COMPARISONS[name](args.checkpoints)
        print_table(found)
        rows += found
        more |= extra
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        path = save(rows, args.out, f"-{'-'.join(args.only)}" if args.only else "", **more)  # what is measured is kept
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
