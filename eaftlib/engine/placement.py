"""Where a model runs, in which types, by which backend, and how much memory it may take."""

import os
import re
from dataclasses import dataclass, replace

import torch

from ..errors import ParameterError
from . import precision
from .precision import Precision


@dataclass(frozen=True)
class Placement:
    """Device and types, why, and the most bytes PyTorch may take of the device (None: all that is free).

    backend: which functions compute, see ``backend.resolve``. processes: how many share the work, each on a GPU of its
    own, the first of them on ``device``.
    """

    device: torch.device
    precision: Precision
    reason: str
    max_bytes: int | None = None
    backend: str = "auto"
    processes: int = 1

    def __str__(self) -> str:
        where = self.device if self.processes == 1 else f"{self.processes} x {self.device.type}"
        limit = "" if self.max_bytes is None else f", at most {self.max_bytes / 1e9:g} GB"
        by = "" if self.backend == "auto" else f", backend {self.backend}"
        why = "; ".join(filter(None, (self.reason, self.precision.reason))) or "as asked"
        return f"{where}, {self.precision.name}{limit}{by} ({why})"

    def of_rank(self, rank: int) -> "Placement":
        """What one of the processes takes."""
        device = torch.device("cuda", rank) if self.device.type == "cuda" else self.device
        return replace(self, device=device, processes=1)


def place(
    device: str = "auto",
    dtype: str = "auto",
    max_gpu_memory: float | None = None,
    backend: str = "auto",
    training: bool = False,
) -> Placement:
    """Resolve ``auto``: every GPU there is, else the CPU; types as ``precision.resolve`` chooses them.

    max_gpu_memory: in GB of 10^9 bytes, of each GPU. Of processes that a launcher started, each takes its own GPU.
    """
    reason, processes = "", 1
    if device == "auto":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if count else "cpu"
        processes = 1 if "LOCAL_RANK" in os.environ else max(1, count)
        reason = {0: "no GPU is present", 1: "a GPU is present"}.get(count, f"{count} GPUs are present")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ParameterError(f"device: found {device!r}, expected 'auto', 'cpu', 'cuda' or 'cuda:N'")
    resolved = torch.device("cuda", 0) if device == "cuda" else torch.device(device)
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ParameterError(f"device: {device!r} was asked for, but PyTorch sees no GPU. Use 'auto' or 'cpu'.")
    used = [torch.device("cuda", i) for i in range(processes)] if processes > 1 else [resolved]
    max_bytes = None if max_gpu_memory is None or resolved.type == "cpu" else int(max_gpu_memory * 1e9)
    return Placement(resolved, precision.resolve(dtype, used, training), reason, max_bytes, backend, processes)


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
