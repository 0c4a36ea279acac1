"""Intervals of paired differences, by resampling what was drawn: conversations, not tokens or blocks.

Tokens of one conversation resemble each other, and a conversation may span blocks; resampling anything smaller than what is
independent gives intervals that are too narrow.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

LEVEL = 0.90  # two one-sided tests at 5 % each
DRAWS = 2000
_AT_ONCE = 1 << 22  # ids drawn at once


@dataclass(frozen=True)
class Sample:
    """What intervals rest on. unit: ``conversations``, or ``blocks`` where files do not say whose a token is."""

    unit: str
    count: int


@dataclass(frozen=True)
class Sums:
    """Of one model, float64 [U] per unit: nll, p and, if they are known, conflicts under the baseline's thresholds."""

    nll: np.ndarray
    prob: np.ndarray
    conflicts: np.ndarray | None


Interval = tuple[float, float]


def paired_intervals(
    kept: np.ndarray, candidate: Sums, baseline: Sums, rng: np.random.Generator
) -> Mapping[str, Interval]:
    """LEVEL percentile intervals of dPPL, d mean p and dCC: whole units, the same of both models, drawn with replacement.

    kept: kept tokens [U]. Nothing for fewer than two units that have any: one alone says nothing of what another would.
    """
    used = kept > 0
    if used.sum() < 2:
        return {}
    columns = [kept, candidate.nll, baseline.nll, candidate.prob, baseline.prob]
    if candidate.conflicts is not None:
        columns += [candidate.conflicts, baseline.conflicts]
    totals = _resampled(np.stack(columns, 1).astype(np.float64)[used], rng)
    means = totals[:, 1:] / totals[:, :1]
    differences = {"ppl": np.exp(means[:, 0]) - np.exp(means[:, 1]), "mean_prob": means[:, 2] - means[:, 3]}
    if candidate.conflicts is not None:
        differences["cc"] = means[:, 4] - means[:, 5]
    ends = [50 * (1 - LEVEL), 50 * (1 + LEVEL)]
    return {name: tuple(map(float, np.percentile(d, ends))) for name, d in differences.items()}


def _resampled(sums: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """float64 [DRAWS, C]: sums [U, C] of as many units as there are, drawn with replacement."""
    units, found = len(sums), []
    at_once = max(1, _AT_ONCE // units)
    for start in range(0, DRAWS, at_once):
        draws = min(at_once, DRAWS - start)
        ids = rng.integers(units, size=(draws, units), dtype=np.int32)
        ids += units * np.arange(draws, dtype=np.int32)[:, None]
        times = np.bincount(ids.ravel(), minlength=draws * units).reshape(draws, units)
        found.append(times @ sums)
    return np.concatenate(found)
