"""Recovery at gpt-oss-20b's shape: tokens a second and memory, resident and with 16 GB of the GPU; random weights."""

import resource
from pathlib import Path

import numpy as np
import torch
from gpu_passes import random_blocks
from harness import now
from torch.profiler import ProfilerActivity

from eaftlib.engine import placement as devices
from eaftlib.engine.launch import over_gpus
from eaftlib.engine.weights import Weights
from eaftlib.model.checkpoint import Checkpoint
from eaftlib.recovery.loop import Objective, Recovery, Schedule
from eaftlib.recovery.loss import Distillation
from eaftlib.recovery.trained import Trained

PARTS = ("routers", "expert_biases", "norms", "attention")
KEEP, LENGTH, BATCH = 16, 2048, 16  # experts of 32; blocks a step


class Steps:
    """Steps of a recovery that starts anew; teacher and student are one set of weights."""

    def __init__(self, checkpoint: Checkpoint, placement: devices.Placement, rank: int | None, parts=PARTS):
        weights = Weights(checkpoint, placement, training=True)
        trained = Trained(checkpoint, parts, rank, placement.device)
        keep = np.zeros((checkpoint.num_layers, checkpoint.num_experts), bool)
        keep[:, :KEEP] = True
        text = random_blocks(checkpoint, 4 * BATCH, LENGTH)
        schedule = Schedule(100, BATCH, 1e-4, 100, 1)
        self.weights, self.parameters = weights, trained.parameters(keep)
        self.recovery = Recovery(weights, keep, trained, text, text, schedule, Objective())
        self.optimizer = torch.optim.AdamW(trained.leaves.values(), fused=True)
        self.loss = Distillation(weights, self.recovery.teacher, self.recovery.student, 0.15, None)
        self.count = 0

    def step(self) -> float:
        started = now()
        self.recovery.step(self.count, self.optimizer, self.loss, lambda tokens: None)
        self.count += 1
        return now() - started


def measure(checkpoint: Checkpoint, label: str, limit: float | None, rank: int | None, warm: int, steps: int) -> dict:
    run = Steps(checkpoint, devices.place("cuda", max_gpu_memory=limit), rank)
    for _ in range(warm):
        run.step()
    torch.cuda.reset_peak_memory_stats()
    seconds = sorted(run.step() for _ in range(steps))
    row = {
        "comparison": f"recovery, {BATCH} x {LENGTH:,} tokens a step, {KEEP} of 32 experts",
        "variant": label,
        "median": BATCH * LENGTH / seconds[len(seconds) // 2],
        "unit": "tokens/s",
        "seconds": seconds,
        "parameters": run.parameters,
        "resident": run.weights.resident,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }
    print(row, flush=True)
    del run
    torch.cuda.empty_cache()
    return row


def compare_recovery(folder: str | Path) -> list[dict]:
    checkpoint = Checkpoint(str(folder))
    rows = [
        measure(checkpoint, "resident, attention whole", None, None, 2, 4),
        measure(checkpoint, "streamed, 16 GB, attention of rank 16", 16.0, 16, 1, 3),
        measure(checkpoint, "resident, attention of rank 16", None, 16, 2, 4),
    ]
    for row in rows:
        row["ratio"] = row["median"] / rows[0]["median"]
    return rows


def profile_step(folder: str | Path) -> list[dict]:
    """GPU seconds of a resident step by kernel, the largest."""
    run = Steps(Checkpoint(str(folder)), devices.place("cuda"), None)
    for _ in range(2):
        run.step()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        wall = run.step()
    kernels = sorted(profiler.key_averages(), key=lambda e: -e.self_device_time_total)
    table = [{"kernel": e.key[:100], "seconds": e.self_device_time_total / 1e6, "calls": e.count} for e in kernels[:40]]
    print(f"\nrecovery step: {wall:.2f} s, kernels {sum(e.self_device_time_total for e in kernels) / 1e6:.2f} s")
    for row in table:
        print(f"  {row['seconds']:7.4f} {row['calls']:6} {row['kernel']}")
    return [{"wall": wall}, *table]


@over_gpus
def _steps_of_rank(checkpoint: Checkpoint, placement: devices.Placement) -> list[float]:
    run = Steps(checkpoint, placement, 16)
    return [run.step() for _ in range(6)][2:]


def compare_gpus(folder: str | Path) -> list[dict]:
    """A step's blocks on one GPU, and shared by all of the machine's."""
    rows = []
    for placement in (devices.place("cuda"), devices.place("auto")):
        seconds = sorted(_steps_of_rank(Checkpoint(str(folder)), placement))
        rate = BATCH * LENGTH / seconds[len(seconds) // 2]
        rows.append(
            {
                "comparison": "recovery, attention of rank 16, resident",
                "variant": f"{placement.processes} GPU(s)",
                "median": rate,
                "unit": "tokens/s",
                "seconds": seconds,
            }
        )
        torch.cuda.empty_cache()
    for row in rows:
        row["ratio"] = row["median"] / rows[0]["median"]
    return rows
