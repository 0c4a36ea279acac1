"""Keep-sets and what they would lose, from a stored trace: other weights, criteria and counts without the model.

What a change does not touch is not computed again: the regions' sums are kept, so that other weights only combine them anew,
and every layer's predicted loss for the experts that it belongs to. On one core, with 24 layers of 32 experts, top 4, a
million kept tokens and 4,096 sampled ones: other weights, another count or criterion take 0.06 s (0.004 s where the same
experts stay), another quantile 0.7 s, the other alignment 2 s, once. Memory 2.6 GB, of which the trace is 1.9.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from ..errors import ParameterError, ResultError
from .criteria import (
    CRITERIA,
    RANDOM,
    RECON,
    GroupSums,
    RegionWeights,
    group_sums,
    plain_sums,
    sums_by_layer,
    token_weights,
    weighted_sums,
)
from .keepsets import keep_count, kept_by
from .ranking import by_sums
from .recon import Layer

if TYPE_CHECKING:  # a trace's module loads the engine
    from .trace import Trace


@dataclass(frozen=True)
class Settings:
    """What can be changed once a trace is there; names and defaults are those of 01_rank."""

    cc_quantile: float = 0.15
    w_good: float = 1.0
    w_uncertain: float = 0.25
    w_conflict: float = -2.0
    align: str = "predictor"

    @classmethod
    def of(cls, ranking: dict) -> Settings:
        """Those that a ranking was made with."""
        return cls(**{name: ranking["provenance"][name] for name in cls.__dataclass_fields__})

    @property
    def weights(self) -> RegionWeights:
        return RegionWeights(self.w_good, self.w_uncertain, self.w_conflict)


@dataclass(frozen=True)
class Choice:
    """A keep-set by one criterion and what is known of it.

    entry: scores and ranking, as ranking.json has them. kept: ids [L, n]. mass: float64 [L], share of the layer's sum of
    g n that the kept experts have. loss: float64 [L], what each layer would lose (see recon.py); None where the trace
    has no Gram matrices.
    """

    entry: dict
    kept: np.ndarray
    mass: np.ndarray
    loss: np.ndarray | None


class Explorer:
    """Choices from a trace and the ranking.json beside it.

    Raises ResultError where one was not made from the other, ParameterError for a criterion it cannot compute.
    """

    def __init__(self, trace: Trace, ranking: dict):
        _require_made_from(trace, ranking)
        self.trace, self.ranking = trace, ranking
        self.num_experts, self.top_k = trace.num_experts, trace.expert.shape[2]
        self.criteria = [*CRITERIA, RANDOM, *([RECON] if RECON in ranking["criteria"] else [])]
        of_layers = () if trace.grams is None else zip(trace.grams, trace.router_logits, strict=True)
        self._layers = [Layer(grams, logits, self.top_k) for grams, logits in of_layers]
        self._plain: dict[str, dict[str, np.ndarray]] = {}  # by alignment
        self._groups: tuple[tuple, GroupSums] | None = None  # the last, and what it is of
        self._losses: dict[tuple[int, bytes], float] = {}  # by layer and its kept experts

    def counts(self) -> list[int]:
        """The keep counts that 02_prune and 03_evaluate would take as they stand."""
        return sorted(
            {keep_count(self.num_experts, self.top_k, keep_n=n) for n in range(self.top_k, self.num_experts + 1)}
        )

    def sums(self, settings: Settings) -> pa.Table:
        """The columns of saliency.parquet, equal to those that 01_rank writes with these settings."""
        if settings.align not in self._plain:
            self._plain[settings.align] = plain_sums(self.trace, settings.align)
        weights, group_of_region = np.unique(list(vars(settings.weights).values()), return_inverse=True)
        # Which regions share a weight, and their order, decide the groups, as in expert_sums; how large it is does not.
        key = (settings.align, settings.cc_quantile, *map(int, group_of_region))
        if self._groups is None or self._groups[0] != key:
            region = token_weights(self.trace, settings.cc_quantile, RegionWeights(0, 1, 2)).astype(np.int64)
            self._groups = key, group_sums(self.trace, group_of_region[region], len(weights), settings.align)
        return weighted_sums(self._plain[settings.align], self._groups[1], weights)

    def choose(self, settings: Settings, criterion: str, keep_n: int) -> Choice:
        sums = self.sums(settings)
        entry = self._entry(sums, criterion)
        kept, _ = kept_by(entry, keep_n)
        mass = sums_by_layer(sums)["gate_norm_sum"]
        share = np.take_along_axis(mass, kept, axis=1).sum(1) / mass.sum(1)
        return Choice(entry, kept, share, self.losses(kept))

    def losses(self, kept: np.ndarray) -> np.ndarray | None:
        """float64 [L]: what each layer loses with the experts of ids [L, n]; None without Gram matrices."""
        if not self._layers:
            return None
        return np.array([self._loss(layer, ids) for layer, ids in enumerate(kept)])

    def _entry(self, sums: pa.Table, criterion: str) -> dict:
        if criterion not in self.criteria:
            raise ParameterError(
                f"criterion: found {criterion!r}, expected one of {self.criteria} (recon: only where the ranking has it)"
            )
        if criterion == RECON:  # no weight enters
            return self.ranking["criteria"][RECON]
        return by_sums(sums, criterion, self.ranking["provenance"]["seed"])

    def _loss(self, layer: int, ids: np.ndarray) -> float:
        key = (layer, ids.tobytes())
        if key not in self._losses:
            kept = np.zeros(self.num_experts, bool)
            kept[ids] = True
            self._losses[key] = self._layers[layer].loss(kept)
        return self._losses[key]


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """int64 [L]: how many experts two keep-sets, ids [L, n] and [L, m], have in common."""
    return np.array([len(np.intersect1d(x, y)) for x, y in zip(a, b, strict=True)])


def _require_made_from(trace: Trace, ranking: dict) -> None:
    layers, _, top_k = trace.expert.shape
    of_trace = trace.provenance | {"num_layers": layers, "num_experts": trace.num_experts, "top_k": top_k}
    said = ranking["provenance"] | {name: ranking[name] for name in ("num_layers", "num_experts", "top_k")}
    for name, value in of_trace.items():
        if said.get(name) != value:
            raise ResultError(
                f"the ranking was not made from this trace: {name} is {said.get(name)!r} there, {value!r} in the trace. Give "
                "the two that one run of 01_rank has written."
            )
