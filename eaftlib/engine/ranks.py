"""Several processes, one GPU each, as ``launch``, ``accelerate launch`` or ``torchrun`` starts them; alone, there is one.

Every rank runs the same program on its share of the blocks and then holds all results, so each may write them: the files
are equal.
"""

import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist

PATIENCE = timedelta(days=7)  # how long a rank waits for a slower one; one that is gone is noticed at once


def current() -> tuple[int, int]:
    """(this process's rank, how many there are)."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=PATIENCE)  # results are exchanged in host memory, once a pass
    return dist.get_rank(), dist.get_world_size()


def on_this_host() -> int:
    """How many of the processes share this host's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def is_first_on_host() -> bool:
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def add_up(tensors: list[torch.Tensor]) -> None:
    """Replace each host tensor by its sum over ranks: exact where at most one rank's value is not zero."""
    if current()[1] > 1:
        for tensor in tensors:
            _reduce(tensor, dist.ReduceOp.SUM)


def largest(value: float) -> float:
    """The largest of the ranks' values."""
    tensor = torch.tensor(value, dtype=torch.float64)
    if current()[1] > 1:
        _reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def total(value: float) -> float:
    """The sum of the ranks' values."""
    tensor = torch.tensor(value, dtype=torch.float64)
    add_up([tensor])
    return tensor.item()


def gather(value: str) -> list[str]:
    """Every rank's value."""
    size = current()[1]
    values = [value] * size
    if size > 1:
        dist.all_gather_object(values, value)
    return values


def _reduce(tensor: torch.Tensor, how: dist.ReduceOp) -> None:
    """In short waits, so that an interrupt, a deadline or a lost rank is acted upon while others still compute."""
    work = dist.all_reduce(tensor, how, async_op=True)
    while not work.is_completed():
        time.sleep(0.01)
    work.wait()
