"""Differences between a candidate and the baseline on the same tokens, with paired intervals and noise floors."""

from dataclasses import dataclass

import numpy as np

from ..errors import ResultError
from .identity import Identity, Question
from .results import Result
from .statistics import cells, conflicts

BOOTSTRAP_DRAWS = 2000
FLOOR_DRAWS = 20


@dataclass(frozen=True)
class Delta:
    """Candidate minus baseline, with the 95 % interval of a paired bootstrap over blocks (None without block data)."""

    value: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Comparison:
    """A candidate against the baseline on one pack and sequence length."""

    ppl: Delta
    cc: Delta  # conflicts under the baseline's thresholds minus the baseline's own rate
    mean_prob: Delta
    js2d: float
    js2d_floor: float | None  # what chance alone gives: the models' values swapped at random, token by token
    cc_rate_at_base: float
    binned: bool  # thresholds, conflicts or floor come from histogram bins, not from tokens
    kl_to_base: float | None
    top1_agreement: float | None


def compare(candidate: Result, baseline: Result, pack: str, seq_len: int) -> Comparison:
    """Raises ResultError when the two results were not made from the same rows, blocks and tokenizer, or one is empty."""
    require_comparable(candidate, baseline, pack, seq_len)
    cand, base = (r.entries[pack, seq_len]["model"] for r in (candidate, baseline))
    js2d = _js2d(candidate, baseline, pack, seq_len)
    tokens_c, tokens_b = candidate.tokens(pack, seq_len), baseline.tokens(pack, seq_len)
    binned = candidate.binned or baseline.binned or tokens_c is None or tokens_b is None
    rng = np.random.default_rng(0)
    if binned:
        cc_at_base, cc_base = (
            _binned_conflict_rate(m["hist2d_x_H"], base["p_thr"], base["h_thr"]) for m in (cand, base)
        )
        cc_blocks = None
        floor = _analytic_floor(cand, base)
    else:
        if not (
            np.array_equal(tokens_c.block, tokens_b.block) and np.array_equal(tokens_c.position, tokens_b.position)
        ):
            raise ResultError(f"{candidate.label} and {baseline.label} kept different tokens of {pack} at {seq_len}")
        hit = conflicts(tokens_c.probability, tokens_c.entropy.astype(np.float64), base["p_thr"], base["h_thr"])
        cc_at_base, cc_base = float(hit.mean()), base["cc_rate"]
        cc_blocks = np.bincount(tokens_c.block, hit, minlength=len(cand["blocks"]["kept"]))
        cells_c, cells_b = (cells(t.probability, t.entropy) for t in (tokens_c, tokens_b))
        floor = swap_floor(cells_c, cells_b, rng)
    intervals = _intervals(cand.get("blocks"), base.get("blocks"), cc_blocks, rng)
    return Comparison(
        ppl=Delta(cand["ppl"] - base["ppl"], intervals.get("ppl")),
        cc=Delta(cc_at_base - cc_base, intervals.get("cc")),
        mean_prob=Delta(cand["mean_prob"] - base["mean_prob"], intervals.get("mean_prob")),
        js2d=js2d,
        js2d_floor=floor,
        cc_rate_at_base=cc_at_base,
        binned=binned,
        kl_to_base=cand.get("kl_to_base"),
        top1_agreement=cand.get("top1_agreement"),
    )


def require_comparable(candidate: Result, baseline: Result, pack: str, seq_len: int) -> None:
    """Same rows, blocks, tokenizer and settings, as far as both files say; else ResultError with both values."""
    for result in (candidate, baseline):
        if (pack, seq_len) not in result.entries:
            raise ResultError(f"{result.path} has no pack {pack} at seq_len {seq_len}; it has {sorted(result.entries)}")
    key = {"pack": pack, "seq_len": seq_len}
    cand, base = (Identity.of(r.meta, r.entries[pack, seq_len] | key) for r in (candidate, baseline))
    if different := cand.differences(base, Question.COMPARABLE):
        raise ResultError(
            f"{candidate.label} cannot be compared with {baseline.label} on {pack} at {seq_len}: "
            f"{'; '.join(map(str, different))}. Evaluate both on the same packs, rows, blocks and tokenizer."
        )


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


def _js2d(candidate: Result, baseline: Result, pack: str, seq_len: int) -> float:
    """Divergence of the two (p, H) histograms."""
    counts = [r.entries[pack, seq_len]["model"]["hist2d_x_H"]["counts"] for r in (candidate, baseline)]
    try:
        return js_divergence(*counts)
    except ResultError as cause:
        raise ResultError(
            f"JS2D of {candidate.label} and {baseline.label} on {pack} at {seq_len}: {cause}. Evaluate again."
        ) from cause


def swap_floor(cells_a: np.ndarray, cells_b: np.ndarray, rng: np.random.Generator) -> float:
    """Mean JS divergence when each token's two cells are swapped with probability 1/2: what no difference would give."""
    size = int(max(cells_a.max(), cells_b.max())) + 1
    draws = []
    for _ in range(FLOOR_DRAWS):
        swap = rng.random(len(cells_a)) < 0.5
        first, second = np.where(swap, cells_b, cells_a), np.where(swap, cells_a, cells_b)
        draws.append(js_divergence(np.bincount(first, minlength=size), np.bincount(second, minlength=size)))
    return float(np.mean(draws))


def _analytic_floor(cand: dict, base: dict) -> float:
    """(occupied cells - 1) / (4 N): the bias of the estimate for two independent samples of N tokens."""
    a, b = (np.asarray(m["hist2d_x_H"]["counts"]) for m in (cand, base))
    return float(((a + b > 0).sum() - 1) / (4 * base["kept_tokens"]))


def _binned_conflict_rate(hist: dict, p_thr: float, h_thr: float) -> float:
    """Share of tokens under both thresholds, a bin that a threshold cuts counted by the part below it."""
    counts = np.asarray(hist["counts"]).reshape(hist["xbins"], hist["ybins"])

    def below(edges, threshold):
        edges = np.asarray(edges)
        return np.clip((threshold - edges[:-1]) / np.diff(edges), 0, 1)

    return float(below(hist["x_edges"], p_thr) @ counts @ below(hist["y_edges"], h_thr) / counts.sum())


def _intervals(cand: dict | None, base: dict | None, cc_blocks: np.ndarray | None, rng: np.random.Generator) -> dict:
    """95 % percentile intervals of each difference, resampling whole blocks of both models together."""
    if cand is None or base is None:
        return {}
    kept = np.asarray(base["kept"], np.float64)
    draws = rng.multinomial(len(kept), np.full(len(kept), 1 / len(kept)), BOOTSTRAP_DRAWS).astype(np.float64)
    total = draws @ kept
    draws, total = draws[total > 0], total[total > 0]  # a draw of blocks without a kept token says nothing

    def mean(values):
        return draws @ np.asarray(values, np.float64) / total

    differences = {
        "ppl": np.exp(mean(cand["nll_sum"])) - np.exp(mean(base["nll_sum"])),
        "mean_prob": mean(cand["prob_sum"]) - mean(base["prob_sum"]),
    }
    if cc_blocks is not None:
        differences["cc"] = mean(cc_blocks) - mean(base["conflicts"])
    return {name: tuple(map(float, np.percentile(d, [2.5, 97.5]))) for name, d in differences.items()}
