"""Seconds before hours: the very weights, functions and device of a long pass are tried for what must come out exactly."""

from dataclasses import replace

import numpy as np

from ..errors import ScoringError
from ..text.packs import Blocks
from . import forward, ranks
from .weights import Weights

LONG_TOKENS = 1 << 19  # of all variants: before a pass of so many, 5 minutes of a T4, 10 seconds of an H100
_LENGTH = 1024  # of the one block that is tried, at most


def selftest(weights: Weights, blocks: Blocks, progress: bool = True) -> None:
    """Score the start of a block with the whole model, again with it, and with a keep-set of all experts.

    Raises ScoringError unless NLL and entropy are equal bit by bit, the divergence is 0 and every arg-max the same.
    """
    first = int(blocks.kept[:, :_LENGTH].any(1).argmax())
    start = blocks.take(slice(first, first + 1))
    start = replace(start, tokens=start.tokens[:, :_LENGTH], kept=start.kept[:, :_LENGTH], row=None)
    everything = np.ones((weights.checkpoint.num_layers, weights.checkpoint.num_experts), bool)
    base, *others = forward.score(weights, start, keep_sets=(None, None, everything), progress=False).variants
    for name, other in zip(("the whole model again", "a keep-set of all experts"), others, strict=True):
        _require_equal(name, base, other)
    if progress and ranks.current()[0] == 0:
        print(f"self-test: the model against itself and with all experts kept, {len(base.nll)} tokens: no difference")


def _require_equal(name: str, base: forward.TokenStatistics, other: forward.TokenStatistics) -> None:
    gaps = {
        "nll": np.abs(base.nll - other.nll),
        "entropy": np.abs(base.entropy - other.entropy),
        "kl_to_base": np.abs(other.kl_to_base),
        "other arg-max": (~other.same_top1).astype(float),
    }
    for number, gap in gaps.items():
        if gap.any():
            raise ScoringError(
                f"self-test: {name} differs from the whole model by up to {gap.max()} in {number}, at "
                f"{np.count_nonzero(gap)} of {len(gap)} tokens, expected 0: the device or its libraries do not repeat "
                "themselves; try another dtype"
            )
