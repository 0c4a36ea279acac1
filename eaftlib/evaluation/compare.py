"""Differences between a candidate and the baseline on the same tokens, with paired intervals and noise floors."""

from dataclasses import dataclass

import numpy as np

from ..errors import ResultError
from .divergence import JS2D, analytic_floor, js_divergence, swap_floor, unbiased
from .identity import Identity, Question
from .resampling import Interval, Sample, Sums, paired_intervals
from .results import Result
from .statistics import Tokens, cells, conflicts


@dataclass(frozen=True)
class Delta:
    """Candidate minus baseline, and its interval, see ``resampling``; None where nothing is recorded to resample."""

    value: float
    interval: Interval | None


@dataclass(frozen=True)
class Comparison:
    """A candidate against the baseline on one pack and sequence length."""

    ppl: Delta
    cc: Delta  # conflicts under the baseline's thresholds minus the baseline's own rate
    mean_prob: Delta
    js2d: JS2D
    cc_rate_at_base: float
    sample: Sample | None  # what the intervals rest on
    binned: bool  # thresholds, conflicts or floor come from histogram bins, not from tokens
    kl_to_base: float | None
    top1_agreement: float | None


def compare(candidate: Result, baseline: Result, pack: str, seq_len: int) -> Comparison:
    """Raises ResultError when the two results were not made from the same rows, blocks and tokenizer, or one is empty."""
    require_comparable(candidate, baseline, pack, seq_len)
    cand, base = (r.model(pack, seq_len) for r in (candidate, baseline))
    tokens = _paired_tokens(candidate, baseline, pack, seq_len)
    js2d, rng = _plug_in(candidate, baseline, pack, seq_len), np.random.default_rng(0)
    part = _of_bins(cand, base, js2d, rng) if tokens is None else _of_tokens(*tokens, cand, base, js2d, rng)
    return Comparison(
        ppl=Delta(cand["ppl"] - base["ppl"], part.intervals.get("ppl")),
        cc=Delta(part.cc_at_base - part.cc_of_base, part.intervals.get("cc")),
        mean_prob=Delta(cand["mean_prob"] - base["mean_prob"], part.intervals.get("mean_prob")),
        js2d=part.js2d,
        cc_rate_at_base=part.cc_at_base,
        sample=part.sample,
        binned=tokens is None,
        kl_to_base=cand.get("kl_to_base"),
        top1_agreement=cand.get("top1_agreement"),
    )


@dataclass(frozen=True)
class _Part:
    """What differs between a comparison from tokens and one from histograms."""

    cc_at_base: float
    cc_of_base: float
    js2d: JS2D
    sample: Sample | None
    intervals: dict[str, Interval]


def _paired_tokens(candidate: Result, baseline: Result, pack: str, seq_len: int) -> tuple[Tokens, Tokens] | None:
    """Both results' values of the same tokens; None where one has none, or its thresholds are of bins."""
    cand, base = candidate.tokens(pack, seq_len), baseline.tokens(pack, seq_len)
    if candidate.binned or baseline.binned or cand is None or base is None:
        return None
    if not (np.array_equal(cand.block, base.block) and np.array_equal(cand.position, base.position)):
        raise ResultError(f"{candidate.label} and {baseline.label} kept different tokens of {pack} at {seq_len}")
    return cand, base


def _of_tokens(cand: Tokens, base: Tokens, c: dict, b: dict, js2d: float, rng: np.random.Generator) -> _Part:
    """Everything exact; conversations are the units where both files name them, else blocks."""
    by_row = cand.row is not None and base.row is not None
    _, unit = np.unique(base.row if by_row else base.block, return_inverse=True)
    kept = np.bincount(unit)
    hits = [conflicts(t.probability, t.entropy.astype(np.float64), b["p_thr"], b["h_thr"]) for t in (cand, base)]

    def sums(t: Tokens, hit: np.ndarray) -> Sums:
        return Sums(*(np.bincount(unit, x) for x in (t.nll.astype(np.float64), t.probability, hit)))

    cells_c, cells_b = (cells(t.probability, t.entropy) for t in (cand, base))
    floor = swap_floor(cells_c, cells_b, rng)
    estimate, interval = unbiased(cells_c, cells_b, unit, floor, rng) or (None, None)
    return _Part(
        cc_at_base=float(hits[0].mean()),
        cc_of_base=b["cc_rate"],
        js2d=JS2D(js2d, estimate, interval, floor),
        sample=Sample("conversations" if by_row else "blocks", len(kept)),
        intervals=dict(paired_intervals(kept, sums(cand, hits[0]), sums(base, hits[1]), rng)),
    )


def _of_bins(c: dict, b: dict, js2d: float, rng: np.random.Generator) -> _Part:
    """From the JSON alone: conflicts from bins, intervals over blocks where both files have their sums."""
    at_base, of_base = (_binned_conflict_rate(m["hist2d_x_H"], b["p_thr"], b["h_thr"]) for m in (c, b))
    floor = analytic_floor(*(np.asarray(m["hist2d_x_H"]["counts"]) for m in (c, b)))
    sample, intervals = None, {}
    if c.get("blocks") and b.get("blocks"):
        kept = np.asarray(b["blocks"]["kept"])
        of_blocks = [Sums(*(np.asarray(m["blocks"][k]) for k in ("nll_sum", "prob_sum")), None) for m in (c, b)]
        sample, intervals = Sample("blocks", int((kept > 0).sum())), dict(paired_intervals(kept, *of_blocks, rng))
    return _Part(at_base, of_base, JS2D(js2d, None, None, floor), sample, intervals)


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


def _plug_in(candidate: Result, baseline: Result, pack: str, seq_len: int) -> float:
    """Divergence of the two (p, H) histograms."""
    counts = [r.entries[pack, seq_len]["model"]["hist2d_x_H"]["counts"] for r in (candidate, baseline)]
    try:
        return js_divergence(*counts)
    except ResultError as cause:
        raise ResultError(
            f"JS2D of {candidate.label} and {baseline.label} on {pack} at {seq_len}: {cause}. Evaluate again."
        ) from cause


def _binned_conflict_rate(hist: dict, p_thr: float, h_thr: float) -> float:
    """Share of tokens under both thresholds, a bin that a threshold cuts counted by the part below it."""
    counts = np.asarray(hist["counts"]).reshape(hist["xbins"], hist["ybins"])

    def below(edges, threshold):
        edges = np.asarray(edges)
        return np.clip((threshold - edges[:-1]) / np.diff(edges), 0, 1)

    return float(below(hist["x_edges"], p_thr) @ counts @ below(hist["y_edges"], h_thr) / counts.sum())
