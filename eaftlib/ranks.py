"""Several processes, one GPU each, as ``launch``, ``accelerate launch`` or ``torchrun`` starts them; alone, there is one.

Every rank runs the same program on its share of the blocks and then holds all results, so each may write them: the files
are equal.
"""

import os

import torch
import torch.distributed as dist


def current() -> tuple[int, int]:
    """(this process's rank, how many there are)."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("gloo")  # results are exchanged in host memory, once a pass
    return dist.get_rank(), dist.get_world_size()


def on_this_host() -> int:
    """How many of the processes share this host's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def add_up(tensors: list[torch.Tensor]) -> None:
    """Replace each host tensor by its sum over ranks: exact where at most one rank's value is not zero."""
    if current()[1] > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def largest(value: float) -> float:
    """The largest of the ranks' values."""
    tensor = torch.tensor(value, dtype=torch.float64)
    if current()[1] > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()
