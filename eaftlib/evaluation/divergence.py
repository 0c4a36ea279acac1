"""How far two (p, H) histograms are apart, and how much of that chance alone gives."""

from dataclasses import dataclass

import numpy as np

from ..errors import ResultError
from .resampling import LEVEL, Interval

FLOOR_DRAWS = 20
_GROUPS = 32  # of units, of which halves and quarters are put together
_SPLITS = 8
_LEAST_UNITS = 8
_Z = {0.90: 1.6448536269514722}[LEVEL]  # that the normal distribution exceeds on either side with probability 5 %


@dataclass(frozen=True)
class JS2D:
    """Jensen-Shannon divergence of two models' (p, H) histograms.

    value: of the histograms as they are, biased upward by about (cells - 1) / (4 N): what the v1 gate judges. estimate:
    without that bias; interval: LEVEL, of the estimate; both None without tokens, or for fewer than _LEAST_UNITS units.
    floor: what no difference would give, see ``swap_floor``; from the formula where there are no tokens.
    """

    value: float
    estimate: float | None
    interval: Interval | None
    floor: float | None


def js_divergence(counts_a, counts_b) -> float:
    """Jensen-Shannon divergence in nats, in [0, ln 2], between two histograms of the same cells.

    Raises ResultError when one of them is empty or not finite: it has no shares to compare.
    """
    a, b = _shares(counts_a), _shares(counts_b)
    middle = (a + b) / 2

    def kl(x):
        used = x > 0
        return float(np.sum(x[used] * np.log(x[used] / middle[used])))

    return max(0.0, (kl(a) + kl(b)) / 2)  # rounding alone can put equal histograms below zero


def _shares(counts) -> np.ndarray:
    counts = np.asarray(counts, np.float64)
    total = counts.sum()
    if not 0 < total < np.inf:
        raise ResultError(f"a histogram is empty or not finite: its {counts.size} counts sum to {total:g}")
    return counts / total


def swap_floor(cells_a: np.ndarray, cells_b: np.ndarray, rng: np.random.Generator) -> float:
    """Mean JS divergence when each token's two cells are swapped with probability 1/2: what no difference would give."""
    size = int(max(cells_a.max(), cells_b.max())) + 1
    draws = []
    for _ in range(FLOOR_DRAWS):
        swap = rng.random(len(cells_a)) < 0.5
        first, second = np.where(swap, cells_b, cells_a), np.where(swap, cells_a, cells_b)
        draws.append(js_divergence(np.bincount(first, minlength=size), np.bincount(second, minlength=size)))
    return float(np.mean(draws))


def analytic_floor(counts_a: np.ndarray, counts_b: np.ndarray) -> float:
    """(occupied cells - 1) / (4 N): the bias of the estimate for two independent samples of N tokens."""
    return float((((counts_a + counts_b) > 0).sum() - 1) / (4 * counts_b.sum()))


def unbiased(
    cells_a: np.ndarray, cells_b: np.ndarray, unit: np.ndarray, floor: float, rng: np.random.Generator
) -> tuple[float, Interval] | None:
    """(estimate without first-order bias, its LEVEL interval) of tokens' cells [N] in both models; unit [N]: whose they are.

    floor: as ``swap_floor`` gives it.

    The bias of a divergence is b / N + c / N^2 + ...: twice that of all minus the mean of two halves' is without b. With
    quarters c goes too; what that would still change, doubled, is added to the interval on both sides. The rest of it is
    1.645 standard errors of the units' sums of the influence of their tokens, (ln p/m + ln q/m) / 2 at a token's two
    cells, m = (p + q) / 2: the divergence is the mean of these over tokens. Where tokens are so few that this series does not
    help, what is left is still upward: the interval reaches down to what the divergence has beyond its floor, which
    understates it. None for fewer than _LEAST_UNITS units.
    """
    units, unit = np.unique(unit, return_inverse=True)
    if len(units) < _LEAST_UNITS:
        return None
    used, both = np.unique(np.concatenate([cells_a, cells_b]), return_inverse=True)
    cells = both[: len(cells_a)], both[len(cells_a) :]
    whole = js_divergence(*(np.bincount(c, minlength=len(used)) for c in cells))
    halves, quarters = _of_parts(cells, len(used), unit, len(units), rng)
    estimate = 2 * whole - halves
    second_order = abs((8 * whole - 6 * halves + quarters) / 3 - estimate)
    chance = _Z * _standard_error(*cells, len(used), unit)
    reach = chance + 2 * second_order
    return estimate, (min(estimate - reach, whole - floor - chance), estimate + reach)


def _of_parts(
    cells: tuple[np.ndarray, np.ndarray], size: int, unit: np.ndarray, units: int, rng: np.random.Generator
) -> tuple[float, float]:
    """Mean divergence of halves and of quarters of the units, over random splits; units go by groups."""
    groups = min(_GROUPS, units)
    group = (rng.permutation(units) % groups)[unit]
    tables = [np.bincount(group * size + c, minlength=groups * size).reshape(groups, size) for c in cells]
    halves, quarters = [], []
    for _ in range(_SPLITS):
        order = rng.permutation(groups)
        parts = [[table[order[k::4]].sum(0) for table in tables] for k in range(4)]
        quarters += [js_divergence(*part) for part in parts]
        halves += [js_divergence(*(x + y for x, y in zip(parts[i], parts[i + 1], strict=True))) for i in (0, 2)]
    return float(np.mean(halves)), float(np.mean(quarters))


def _standard_error(cells_a: np.ndarray, cells_b: np.ndarray, size: int, unit: np.ndarray) -> float:
    p, q = (np.bincount(c, minlength=size) / len(c) for c in (cells_a, cells_b))
    middle = (p + q) / 2
    of_a, of_b = (np.log(np.where(x > 0, x, middle) / middle) / 2 for x in (p, q))
    influence = of_a[cells_a] + of_b[cells_b]
    sums = np.bincount(unit, influence - influence.mean())
    return float(np.sqrt(np.sum(sums**2)) / len(unit))
