"""From a trace to one score per expert: token weights by region, sums over tokens, and every criterion."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from ..errors import ParameterError

if TYPE_CHECKING:  # a trace's module loads the engine, which names of criteria do not need
    from .trace import Trace

ALIGNMENTS = ("predictor", "token")


@dataclass(frozen=True)
class RegionWeights:
    """Weight of a token by region (EAFT, arXiv 2601.02151): sure and right, unsure, sure and wrong."""

    good: float = 1.0
    uncertain: float = 0.25
    conflict: float = -2.0


def token_weights(trace: Trace, cc_quantile: float, weights: RegionWeights) -> np.ndarray:
    """float64 [N]: good (p >= p_lo, H <= H_lo), conflict (p < p_lo, H <= H_lo), uncertain (the rest).

    p_lo and H_lo are the ``cc_quantile`` quantiles over the trace's tokens.
    """
    p, h = trace.probability, trace.entropy.astype(np.float64)
    p_lo, h_lo = region_bounds(p, h, cc_quantile)
    sure = h <= h_lo
    return np.where(~sure, weights.uncertain, np.where(p >= p_lo, weights.good, weights.conflict))


def region_bounds(p: np.ndarray, h: np.ndarray, cc_quantile: float) -> tuple[float, float]:
    """(p_lo, H_lo): exact quantiles over tokens of their probability and entropy, float64."""
    return float(np.quantile(p, cc_quantile)), float(np.quantile(h, cc_quantile))


def expert_sums(trace: Trace, token_weight: np.ndarray, align: str = "predictor") -> pa.Table:
    """Sums over kept tokens per (layer, expert), float64; the columns of saliency.parquet.

    ``pos_`` and ``neg_`` columns are counts and plain sums of g n over the tokens with w > 0 and with w < 0.
    align: ``predictor`` pairs a token with the routing at the position that predicted it, ``token`` with its own.
    """
    weights, group = np.unique(token_weight, return_inverse=True)
    return weighted_sums(plain_sums(trace, align), group_sums(trace, group, len(weights), align), weights)


@dataclass(frozen=True)
class GroupSums:
    """Of groups of tokens, [groups, L, E]: how many were routed to an expert (int64), and their sum of g n (float64)."""

    count: np.ndarray
    gate_norm: np.ndarray


def plain_sums(trace: Trace, align: str) -> dict[str, np.ndarray]:
    """[L, E]: the columns of expert_sums that no weight enters."""
    found = []
    for expert, pairs in _routed(trace, align, ("gate", "norm", "peak")):
        g, n, peak = (values.astype(np.float64) for values in pairs)

        def total(values=None, expert=expert):
            return np.bincount(expert, values, minlength=trace.num_experts)

        max_activation = np.zeros(trace.num_experts)
        np.maximum.at(max_activation, expert, peak)
        columns = {"count": total(), "gate_sum": total(g), "norm_sum": total(n), "gate_norm_sum": total(g * n)}
        found.append(columns | {"norm_sq_sum": total(n * n), "max_activation": max_activation})
    return {name: np.stack([columns[name] for columns in found]) for name in found[0]}


def group_sums(trace: Trace, group: np.ndarray, num_groups: int, align: str) -> GroupSums:
    """group: integers [N], 0 to num_groups - 1 for each kept token. Apart, so that other weights need no other pass."""
    counts, sums = [], []
    size = num_groups * trace.num_experts
    first = np.repeat(group * trace.num_experts, trace.expert.shape[2])
    for expert, (gate, norm) in _routed(trace, align, ("gate", "norm")):
        cell = first + expert
        counts.append(np.bincount(cell, minlength=size))
        sums.append(np.bincount(cell, gate.astype(np.float64) * norm, minlength=size))
    count, gate_norm = (np.stack(x).reshape(len(x), num_groups, -1).swapaxes(0, 1) for x in (counts, sums))
    return GroupSums(count, gate_norm)


def weighted_sums(plain: dict[str, np.ndarray], groups: GroupSums, weights: np.ndarray) -> pa.Table:
    """The columns of saliency.parquet, where the tokens of group i weigh weights[i]."""
    layer, expert = np.indices(plain["count"].shape)
    columns = {"layer": layer, "expert": expert} | plain
    columns["eaft_gate_norm_sum"] = sum(w * part for w, part in zip(weights, groups.gate_norm, strict=True))
    for name, chosen in (("pos", weights > 0), ("neg", weights < 0)):
        columns[f"{name}_gate_norm_sum"] = groups.gate_norm[chosen].sum(0)
    for name, chosen in (("pos", weights > 0), ("neg", weights < 0)):
        columns[f"{name}_count"] = groups.count[chosen].sum(0)
    return pa.table({name: values.ravel() for name, values in columns.items()})


def _routed(trace: Trace, align: str, names: tuple[str, ...]) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """By layer, for each kept token and each of its experts [N * top_k]: the expert (int64), and what else is asked for."""
    if align not in ALIGNMENTS:
        raise ParameterError(f"align: found {align!r}, expected one of {ALIGNMENTS}")
    rows = trace.predictor_row if align == "predictor" else trace.token_row
    for layer, expert in enumerate(trace.expert):
        pairs = [getattr(trace, name)[layer].take(rows, axis=0).ravel() for name in names]
        yield expert.take(rows, axis=0).ravel().astype(np.int64), pairs


# Score of an expert from its sums; sources: REAP arXiv 2510.13999, activation norms and their means arXiv 2606.15716.
CRITERIA = {
    "frequency": lambda s: s["count"].astype(float),
    "gate_mass": lambda s: s["gate_sum"],
    "ean": lambda s: s["norm_sum"],
    "ean_mean": lambda s: _mean(s["norm_sum"], s["count"]),
    "msan": lambda s: _mean(s["norm_sq_sum"], s["count"]),
    "reap": lambda s: _mean(s["gate_norm_sum"], s["count"]),
    "reap_mass": lambda s: s["gate_norm_sum"],
    "eaft_reap": lambda s: s["eaft_gate_norm_sum"],
    "eaft_reap_mean": lambda s: _mean(s["eaft_gate_norm_sum"], s["count"]),
}
MEANS = ("ean_mean", "msan", "reap", "eaft_reap_mean")  # of those, averages: none where no token came
RANDOM = "random"
RECON = "recon"  # from Gram matrices instead of sums, see recon.py


def criterion_scores(sums: pa.Table, criterion: str, seed: int = 0) -> np.ndarray:
    """float64 [L, E], larger is more worth keeping; NaN where a mean has no token to average."""
    columns = sums_by_layer(sums)
    if criterion == RANDOM:
        if seed < 0:
            raise ParameterError(f"seed: found {seed}, expected 0 or more")
        return np.random.default_rng(seed).random(columns["count"].shape)
    if criterion not in CRITERIA:
        raise ParameterError(f"criteria: found {criterion!r}, expected some of {[*CRITERIA, RANDOM]}")
    return CRITERIA[criterion](columns)


def rank_experts(scores: np.ndarray, routed: np.ndarray | None = None) -> np.ndarray:
    """int64 [L, E]: expert ids best first. Never-routed experts (routed [L, E] false) rank last; ties: lower id first."""
    last = np.zeros(scores.shape, bool) if routed is None else ~routed
    ids = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    return np.lexsort((ids, -np.nan_to_num(scores, nan=-np.inf), last), axis=-1)


def sums_by_layer(sums: pa.Table) -> dict[str, np.ndarray]:
    """Columns of saliency.parquet as [num_layers, num_experts]."""
    layers = sums["layer"].to_numpy()
    num_layers = int(layers.max()) + 1
    return {name: sums[name].to_numpy().reshape(num_layers, -1) for name in sums.column_names}


def _mean(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
