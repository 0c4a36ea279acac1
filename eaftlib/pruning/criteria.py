"""From a trace to one score per expert: token weights by region, sums over tokens, and every criterion."""

from __future__ import annotations

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
    if align not in ALIGNMENTS:
        raise ParameterError(f"align: found {align!r}, expected one of {ALIGNMENTS}")
    rows = trace.predictor_row if align == "predictor" else trace.token_row
    layers, _, top_k = trace.expert.shape
    w = np.repeat(token_weight, top_k)
    tables = []
    for layer in range(layers):
        expert = trace.expert[layer, rows].ravel().astype(np.int64)
        g, n, peak = (getattr(trace, k)[layer, rows].ravel().astype(np.float64) for k in ("gate", "norm", "peak"))

        def total(values=None, expert=expert):
            return np.bincount(expert, values, minlength=trace.num_experts)

        max_activation = np.zeros(trace.num_experts)
        np.maximum.at(max_activation, expert, peak)
        tables.append(
            {
                "layer": np.full(trace.num_experts, layer),
                "expert": np.arange(trace.num_experts),
                "count": total(),
                "gate_sum": total(g),
                "norm_sum": total(n),
                "gate_norm_sum": total(g * n),
                "norm_sq_sum": total(n * n),
                "max_activation": max_activation,
                "eaft_gate_norm_sum": total(w * g * n),
                "pos_gate_norm_sum": total((w > 0) * g * n),
                "neg_gate_norm_sum": total((w < 0) * g * n),
                "pos_count": total(w > 0).astype(np.int64),
                "neg_count": total(w < 0).astype(np.int64),
            }
        )
    return pa.table({name: np.concatenate([t[name] for t in tables]) for name in tables[0]})


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
RANDOM = "random"
RECON = "recon"  # from Gram matrices instead of sums, see recon.py


def criterion_scores(sums: pa.Table, criterion: str, seed: int = 0) -> np.ndarray:
    """float64 [L, E], larger is more worth keeping; NaN where a mean has no token to average."""
    columns = sums_by_layer(sums)
    if criterion == RANDOM:
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
