"""Aggregates of per-token statistics: perplexity, thresholds, confident conflicts, the (p, H) histogram."""

from dataclasses import dataclass

import numpy as np

P_BINS, H_BINS = 160, 120


@dataclass(frozen=True)
class Tokens:
    """Kept tokens of one model on one pack and sequence length, ordered by block and position.

    block, position int32 [N]; nll, entropy float32 [N]. row int32 [N]: the conversation that each is of, counted in the order
    in which the pack's rows were read; None in files of earlier versions.
    """

    block: np.ndarray
    position: np.ndarray
    nll: np.ndarray
    entropy: np.ndarray
    row: np.ndarray | None = None

    @property
    def probability(self) -> np.ndarray:
        """p = exp(-nll), float64 [N]."""
        return np.exp(-self.nll.astype(np.float64))


def conflicts(p: np.ndarray, h: np.ndarray, p_thr: float, h_thr: float) -> np.ndarray:
    """bool [N]: confident conflicts, sure (H <= h_thr) and wrong (p <= p_thr)."""
    return (p <= p_thr) & (h <= h_thr)


def histogram2d(p: np.ndarray, h: np.ndarray) -> np.ndarray:
    """int64 [P_BINS, H_BINS]: counts over (p, H) in equal bins on [0, 1]^2; the last bin holds 1 too."""
    return np.bincount(cells(p, h), minlength=P_BINS * H_BINS).reshape(P_BINS, H_BINS)


def cells(p: np.ndarray, h: np.ndarray) -> np.ndarray:
    """int64 [N]: row-major index of each token's histogram cell."""
    x = np.minimum((p.astype(np.float64) * P_BINS).astype(np.int64), P_BINS - 1)
    y = np.minimum((h.astype(np.float64) * H_BINS).astype(np.int64), H_BINS - 1)
    return x * H_BINS + y


def aggregate(tokens: Tokens, num_blocks: int, cc_quantile: float) -> dict:
    """The ``model`` entry of a result: every aggregate over kept tokens, and sums per block for paired differences.

    Quantiles are exact (linear interpolation); sums are float64.
    """
    nll, h, p = tokens.nll.astype(np.float64), tokens.entropy.astype(np.float64), tokens.probability
    p_thr, h_thr = float(np.quantile(p, cc_quantile)), float(np.quantile(h, cc_quantile))
    conflict = conflicts(p, h, p_thr, h_thr)
    low_p, low_h = p <= p_thr, h <= h_thr
    counts = histogram2d(p, h)
    x_edges, y_edges = np.linspace(0, 1, P_BINS + 1).tolist(), np.linspace(0, 1, H_BINS + 1).tolist()

    def per_block(values=None):
        return np.bincount(tokens.block, values, minlength=num_blocks).tolist()

    return {
        "ppl": float(np.exp(nll.mean())),
        "kept_tokens": len(nll),
        "mean_prob": float(p.mean()),
        "mean_entropy": float(h.mean()),
        "mean_nll": float(nll.mean()),
        "var_nll": float(nll.var()),
        "p_thr": p_thr,
        "h_thr": h_thr,
        "cc_rate": float(conflict.mean()),
        "cc_count": int(conflict.sum()),
        "quadrants": {  # p low or high, then H low or high; shares
            "LL": float((low_p & low_h).mean()),
            "LH": float((low_p & ~low_h).mean()),
            "HL": float((~low_p & low_h).mean()),
            "HH": float((~low_p & ~low_h).mean()),
        },
        "hist2d_x_H": {
            "x_edges": x_edges,
            "y_edges": y_edges,
            "counts": counts.ravel().tolist(),
            "xbins": P_BINS,
            "ybins": H_BINS,
        },
        "hist1d_x": {"edges": x_edges, "counts": counts.sum(1).tolist()},
        "hist1d_H": {"edges": y_edges, "counts": counts.sum(0).tolist()},
        "blocks": {
            "kept": per_block(),
            "nll_sum": per_block(nll),
            "prob_sum": per_block(p),
            "entropy_sum": per_block(h),
            "conflicts": per_block(conflict.astype(np.float64)),
        },
    }
