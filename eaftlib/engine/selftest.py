"""Before hours of computing: the very weights, functions and device that will do it agree with themselves on one block."""

import numpy as np

from ..errors import ScoringError
from ..text.packs import Blocks
from . import forward
from .weights import Weights


def require_sound(weights: Weights, blocks: Blocks, entropy_topk: int = 20) -> None:
    """The model again, and with all of its experts kept, gives every token's numbers bit for bit; takes one pass of one block.

    Raises ScoringError where it does not: memory or a GPU is faulty, or a kernel reads what it did not write.
    """
    fullest = int(blocks.kept.sum(1).argmax())
    everything = np.ones((weights.checkpoint.num_layers, weights.checkpoint.num_experts), bool)
    run = forward.score(
        weights,
        blocks.take(slice(fullest, fullest + 1)),
        keep_sets=[None, None, everything],
        entropy_topk=entropy_topk,
        progress=False,
    )
    first, *others = run.variants
    for name, other in zip(("the model again", "the model with all experts kept"), others, strict=True):
        differing = (other.nll != first.nll) | (other.entropy != first.entropy) | ~other.same_top1
        if differing.any():
            at = int(differing.argmax())
            raise ScoringError(
                f"self-test on block {fullest}: {name} gives token {at} nll {other.nll[at]}, expected {first.nll[at]} "
                f"({int(differing.sum())} of {len(differing)} tokens differ). Run again; if it happens again, another GPU, or "
                "dtype float32, tells whether the device is at fault."
            )
