"""Where a model runs, in which type, and how much memory it may take."""

import os
import re
from dataclasses import dataclass, replace

import torch

from ..errors import ParameterError


@dataclass(frozen=True)
class Placement:
    """Device and type, why, and the most bytes PyTorch may take of the device (None: all that is free).

    processes: how many share the work, each on a GPU of its own, the first of them on ``device``.
    """

    device: torch.device
    dtype: torch.dtype
    reason: str
    max_bytes: int | None = None
    processes: int = 1

    def __str__(self) -> str:
        where = self.device if self.processes == 1 else f"{self.processes} x {self.device.type}"
        limit = "" if self.max_bytes is None else f", at most {self.max_bytes / 1e9:g} GB"
        return f"{where}, {str(self.dtype).removeprefix('torch.')}{limit} ({self.reason})"

    def of_rank(self, rank: int) -> "Placement":
        """What one of the processes takes."""
        device = torch.device("cuda", rank) if self.device.type == "cuda" else self.device
        return replace(self, device=device, processes=1)


def place(device: str = "auto", dtype: str = "auto", max_gpu_memory: float | None = None) -> Placement:
    """Resolve ``auto``: every GPU there is, else the CPU; bfloat16 where the hardware computes it, else float32.

    max_gpu_memory: in GB of 10^9 bytes, of each GPU. Of processes that a launcher started, each takes its own GPU.
    """
    reasons = []
    processes = 1
    if device == "auto":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if count else "cpu"
        processes = 1 if "LOCAL_RANK" in os.environ else max(1, count)
        reasons.append({0: "no GPU is present", 1: "a GPU is present"}.get(count, f"{count} GPUs are present"))
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ParameterError(f"device: found {device!r}, expected 'auto', 'cpu', 'cuda' or 'cuda:N'")
    resolved = torch.device("cuda", 0) if device == "cuda" else torch.device(device)
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ParameterError(f"device: {device!r} was asked for, but PyTorch sees no GPU. Use 'auto' or 'cpu'.")
    used = range(processes) if processes > 1 else [resolved]
    if dtype == "auto":
        if resolved.type == "cpu":
            dtype, why = "float32", "a CPU is exact in it at little cost"
        elif min(map(torch.cuda.get_device_capability, used)) >= (8, 0):
            dtype, why = "bfloat16", "the type the model was published in"
        else:
            dtype, why = "float32", "this GPU lacks bfloat16, and float16 overflows on gpt-oss"
        reasons.append(f"{dtype}: {why}")
    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in types:
        raise ParameterError(f"dtype: found {dtype!r}, expected 'auto' or one of {sorted(types)}")
    max_bytes = None if max_gpu_memory is None or resolved.type == "cpu" else int(max_gpu_memory * 1e9)
    return Placement(resolved, types[dtype], "; ".join(reasons) or "as asked", max_bytes, processes)


def take(placement: Placement) -> None:
    """Make the device the current one, where kernels start, and PyTorch refuse more of it than the placement allows."""
    if placement.device.type == "cuda":
        torch.cuda.set_device(placement.device)
        total = torch.cuda.get_device_properties(placement.device).total_memory
        share = 1.0 if placement.max_bytes is None else min(1.0, placement.max_bytes / total)
        torch.cuda.set_per_process_memory_fraction(share, placement.device)


def free_bytes(device: torch.device, max_bytes: int | None = None) -> int:
    """Bytes that new tensors on the device can take."""
    if device.type == "cuda":
        reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + reserved - allocated
        return free if max_bytes is None else min(free, max_bytes - allocated)
    import psutil

    return psutil.virtual_memory().available
