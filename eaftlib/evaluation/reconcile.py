"""Whether the numbers of a result's entry agree: with one another, and with the tokens that they were made of."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .statistics import P_BINS, Tokens, aggregate

# Aggregates are of the float32 values that tokens.parquet stores, so that storing them loses nothing. What may differ between
# two machines is the last bit of exp, and the order of float64 sums: n * 2^-53 of a sum of n terms, 1.1e-9 of 10 million.
ROUNDING = 1e-9  # of a number itself; absolute below 1
_LAST_BITS = 1e-12  # a probability that is so near to a threshold, or to a bin's edge, may lie on either side of it
# Earlier files: float32 sums, and histograms of values that were rounded before they were binned.
_EARLIER = 1e-4
_EARLIER_MOST = 30.0  # their ppl is exp of mean_nll, or of this where it is less
_SUMS = ("kept", "nll_sum", "prob_sum", "entropy_sum", "conflicts")
_EDGES = 1e-6  # earlier files have float32 ones; others than from 0 to 1, of log10 p, cannot be compared with them
_BY_LOGSUMEXP = 1e-4  # p is exp(z - logsumexp(z)), float32: it may be above 1 by so much


class Disagreement(NamedTuple):
    """A field and two values of it: as it is, and what the other fields, or the tokens, say."""

    field: str
    found: object
    expected: str

    def __str__(self) -> str:
        return f"{self.field} is {self.found}, expected {self.expected}"


def impossible(tokens: Tokens, seq_len: int, num_blocks: int | None) -> Iterator[Disagreement]:
    """What no evaluation can have written; at most one, so that what comes later may rest on it."""
    place = tokens.block.astype(np.int64) * seq_len + tokens.position
    blocks = "0 or more" if num_blocks is None else f"0 to {num_blocks - 1}"
    rules = (
        ("kept tokens", np.array([len(place)]), place.size > 0, "some"),
        ("block", tokens.block, (tokens.block >= 0) & (tokens.block < (num_blocks or np.inf)), blocks),
        ("position", tokens.position, (tokens.position > 0) & (tokens.position < seq_len), f"1 to {seq_len - 1}"),
        ("position", tokens.position, np.diff(place, prepend=-1) > 0, "every token once, by block and position"),
        ("nll", tokens.nll, np.isfinite(tokens.nll) & (tokens.nll >= -_BY_LOGSUMEXP), "a number, 0 or more"),
        ("entropy", tokens.entropy, (tokens.entropy >= 0) & (tokens.entropy <= 1), "0 to 1"),
        ("row", tokens.row, tokens.row is None or tokens.row >= 0, "0 or more"),
    )
    for name, values, holds, expected in rules:
        if not np.all(holds):
            yield Disagreement(name, values[np.argmin(holds)], expected)
            return


def with_itself(model: dict, num_blocks: int | None, cc_quantile: float | None) -> Iterator[Disagreement]:
    """Fields of an entry's ``model`` against one another. num_blocks, cc_quantile: the settings, None where not recorded."""
    exactly = ROUNDING if model.get("blocks") else _EARLIER
    yield from _of_means(model, exactly)
    yield from _of_histograms(model)
    yield from _of_conflicts(model, exactly)
    yield from _of_thresholds(model, cc_quantile)
    if model.get("blocks"):
        yield from _of_blocks(model, num_blocks)


def with_tokens(model: dict, tokens: Tokens, num_blocks: int, cc_quantile: float) -> Iterator[Disagreement]:
    """Every aggregate of an entry's ``model`` against the tokens: numbers to ROUNDING, counts exactly.

    A count may differ by the tokens whose probability is within the last bits of a threshold or of an edge.
    """
    with np.errstate(over="ignore"):  # of ppl, which then is not what the entry has
        expected = aggregate(tokens, num_blocks, cc_quantile)
    yield from _numbers(model, expected)
    yield from _counts(model, expected, tokens)


def _numbers(model: dict, expected: dict) -> Iterator[Disagreement]:
    for name in ("kept_tokens", "mean_nll", "ppl", "var_nll", "mean_prob", "mean_entropy", "p_thr", "h_thr"):
        if name in model and not _near(model[name], expected[name]):
            yield Disagreement(name, model[name], f"{expected[name]} by its tokens")
    for name in _SUMS[:-1]:
        found, sums = (np.asarray(m["blocks"][name], np.float64) for m in (model, expected))
        if found.shape != sums.shape or not np.all(_near(found, sums)):
            yield Disagreement(f"blocks.{name}", *_first(found, sums))


def _counts(model: dict, expected: dict, tokens: Tokens) -> Iterator[Disagreement]:
    p, h = tokens.probability, tokens.entropy.astype(np.float64)
    edge = np.rint(p * P_BINS)
    doubtful = np.count_nonzero((np.abs(p * P_BINS - edge) <= _LAST_BITS * P_BINS) & (edge > 0) & (edge < P_BINS))
    for name in ("hist2d_x_H", "hist1d_x", "hist1d_H"):
        found, counts = (np.asarray(m.get(name, expected[name])["counts"]) for m in (model, expected))
        if found.shape != counts.shape or np.abs(found - counts).sum() > (2 * doubtful if name != "hist1d_H" else 0):
            yield Disagreement(f"{name}.counts", *_first(found, counts))
    at_p = np.abs(p - model["p_thr"]) <= _LAST_BITS
    low_p, low_h = p <= model["p_thr"], h <= model["h_thr"]
    conflict, unsure = low_p & low_h, at_p & low_h
    if abs(model["cc_count"] - np.count_nonzero(conflict)) > np.count_nonzero(unsure):
        yield Disagreement("cc_count", model["cc_count"], f"{np.count_nonzero(conflict)} by its tokens")
    blocks = [np.bincount(tokens.block, x, minlength=len(model["blocks"]["conflicts"])) for x in (conflict, unsure)]
    found = np.asarray(model["blocks"]["conflicts"], np.float64)
    if np.any(np.abs(found - blocks[0]) > blocks[1]):
        yield Disagreement("blocks.conflicts", *_first(found, blocks[0]))
    quadrants = {"LL": conflict, "LH": low_p & ~low_h, "HL": ~low_p & low_h, "HH": ~low_p & ~low_h}
    for name, share in model.get("quadrants", {}).items():
        if abs(share - quadrants[name].mean()) > at_p.mean() + ROUNDING:
            yield Disagreement(f"quadrants.{name}", share, f"{quadrants[name].mean()} by its tokens")


def _of_means(model: dict, exactly: float) -> Iterator[Disagreement]:
    nll = model["mean_nll"] if model.get("blocks") else min(model["mean_nll"], _EARLIER_MOST)
    with np.errstate(over="ignore"):
        ppl = float(np.exp(nll))
    if not _near(model["ppl"], ppl, exactly):
        yield Disagreement("ppl", model["ppl"], f"exp(mean_nll), {ppl}")
    least = -math.log(model["mean_prob"]) if model["mean_prob"] > 0 else math.inf  # Jensen: -ln is convex
    if model["mean_nll"] < least - _EARLIER:
        yield Disagreement("mean_nll", model["mean_nll"], f"at least -ln(mean_prob), {least}")


def _of_histograms(model: dict) -> Iterator[Disagreement]:
    histogram = model["hist2d_x_H"]
    for name in ("x_edges", "y_edges"):
        edges, even = np.asarray(histogram[name]), np.linspace(0, 1, len(histogram[name]))
        if not np.all(np.abs(edges - even) <= _EDGES):
            yield Disagreement(f"hist2d_x_H.{name}", f"{edges[0]} to {edges[-1]}", "edges that rise evenly from 0 to 1")
            return
    counts = _table(model)
    if (total := int(counts.sum())) != model["kept_tokens"]:
        yield Disagreement("hist2d_x_H.counts", f"{total} in all", f"kept_tokens, {model['kept_tokens']}")
        return
    axes = {"mean_prob": ("x_edges", counts.sum(1)), "mean_entropy": ("y_edges", counts.sum(0))}
    for name, (edges, of_axis) in axes.items():
        ends = [float(of_axis @ histogram[edges][i : len(of_axis) + i]) / total for i in (0, 1)]
        if not ends[0] - _EARLIER <= model[name] <= ends[1] + _EARLIER:
            yield Disagreement(name, model[name], f"{ends[0]:.6g} to {ends[1]:.6g}, by the histogram")
    yield from _of_nll(model, np.asarray(histogram["x_edges"]), counts.sum(1))
    if model.get("blocks"):
        yield from _of_margins(model, counts)


def _of_nll(model: dict, edges: np.ndarray, counts: np.ndarray) -> Iterator[Disagreement]:
    """mean_nll lies between what the bins' upper and lower edges give; the first bin's lower edge gives no bound."""
    used = counts > 0
    least, most = (
        float(counts[used] @ -np.log(np.maximum(e[used], 1e-300))) / counts.sum() for e in (edges[1:], edges[:-1])
    )
    most = math.inf if used[0] else most
    if not least - _EARLIER <= model["mean_nll"] <= most + _EARLIER:
        yield Disagreement("mean_nll", model["mean_nll"], f"{least:.6g} to {most:.6g}, by the histogram")


def _of_margins(model: dict, counts: np.ndarray) -> Iterator[Disagreement]:
    for name, of, axis in (("hist1d_x", "x_edges", 1), ("hist1d_H", "y_edges", 0)):
        found = model.get(name)
        if found and found["edges"] != model["hist2d_x_H"][of]:
            yield Disagreement(f"{name}.edges", "others", f"those of hist2d_x_H.{of}")
        elif found and found["counts"] != counts.sum(axis).tolist():
            yield Disagreement(f"{name}.counts", "others", "the sums of hist2d_x_H")


def _of_conflicts(model: dict, exactly: float) -> Iterator[Disagreement]:
    if not _near(model["cc_rate"], rate := model["cc_count"] / model["kept_tokens"], exactly):
        yield Disagreement("cc_rate", model["cc_rate"], f"cc_count / kept_tokens, {rate}")
    if quadrants := model.get("quadrants"):
        if not _near(total := math.fsum(quadrants.values()), 1, exactly):
            yield Disagreement("quadrants", f"{total} in all", "1 in all")
        if not _near(quadrants["LL"], model["cc_rate"], exactly):
            yield Disagreement("quadrants.LL", quadrants["LL"], f"cc_rate, {model['cc_rate']}")


def _of_thresholds(model: dict, cc_quantile: float | None) -> Iterator[Disagreement]:
    """What the bins that lie below the thresholds, and those that only begin there, say of counts under them."""
    counts, histogram, kept = _table(model), model["hist2d_x_H"], model["kept_tokens"]
    below_p, below_h = (_below(histogram[f"{axis}_edges"], model[f"{name}_thr"]) for axis, name in ("xp", "yh"))
    least, most = (int(counts[:p, :h].sum()) for p, h in zip(below_p, below_h, strict=True))
    if not least <= model["cc_count"] <= most:
        yield Disagreement("cc_count", model["cc_count"], f"{least} to {most}, by the histogram and the thresholds")
    for name, of_axis, below in (("p_thr", counts.sum(1), below_p), ("h_thr", counts.sum(0), below_h)):
        least, most = (int(of_axis[:end].sum()) for end in below)
        if cc_quantile is not None and not least - 1 <= cc_quantile * (kept - 1) <= most:
            yield Disagreement(
                name, model[name], f"the {cc_quantile} quantile; {least} to {most} of {kept} tokens are below"
            )
        if quadrants := model.get("quadrants"):
            share = quadrants["LL"] + quadrants["LH" if name == "p_thr" else "HL"]
            if not least / kept - _EARLIER <= share <= most / kept + _EARLIER:
                yield Disagreement("quadrants", f"{share} up to {name}", f"{least / kept:.6g} to {most / kept:.6g}")


def _below(edges: list[float], threshold: float) -> tuple[int, int]:
    """(how many bins lie wholly below, how many begin below or at a threshold); one at an edge may be on either side."""
    edges = np.asarray(edges)
    whole = np.searchsorted(edges[1:], threshold - _EARLIER / len(edges), side="right")
    return int(whole), int(np.searchsorted(edges[:-1], threshold + _EARLIER / len(edges), side="right"))


def _of_blocks(model: dict, num_blocks: int | None) -> Iterator[Disagreement]:
    blocks = {name: np.asarray(model["blocks"][name], np.float64) for name in _SUMS}
    sizes = {len(values) for values in blocks.values()}
    if sizes != {num_blocks}:
        yield Disagreement("blocks", f"{sorted(sizes)} numbers each", f"as many as meta.num_blocks says, {num_blocks}")
        return
    kept = blocks["kept"]
    sums = (
        ("kept", "kept_tokens", 1),
        ("nll_sum", "mean_nll", kept.sum()),
        ("prob_sum", "mean_prob", kept.sum()),
        ("entropy_sum", "mean_entropy", kept.sum()),
        ("conflicts", "cc_count", 1),
    )
    for name, of, times in sums:
        total, expected = math.fsum(blocks[name]), float(model[of] * times)
        if not _near(total, expected):
            yield Disagreement(f"blocks.{name}", f"{total} in all", f"{expected}, by {of}")
    for name in ("prob_sum", "entropy_sum", "conflicts"):
        if np.any(blocks[name] < -_BY_LOGSUMEXP * kept) or np.any(blocks[name] > kept * (1 + _BY_LOGSUMEXP)):
            yield Disagreement(f"blocks.{name}", "beyond it somewhere", "0 to kept, in every block")
    used = kept > 0
    mean_p, mean_nll = blocks["prob_sum"][used] / kept[used], blocks["nll_sum"][used] / kept[used]
    if np.any(mean_nll < -np.log(np.maximum(mean_p, 1e-300)) - _BY_LOGSUMEXP):
        yield Disagreement("blocks.nll_sum", "less somewhere", "at least -ln of the block's mean probability")


def _table(model: dict) -> np.ndarray:
    """int64 [xbins, ybins]"""
    histogram = model["hist2d_x_H"]
    return np.asarray(histogram["counts"], np.int64).reshape(histogram["xbins"], histogram["ybins"])


def _near(found, expected, exactly: float = ROUNDING):
    return np.abs(np.subtract(found, expected)) <= exactly * np.maximum(1, np.abs(expected))


def _first(found: np.ndarray, expected: np.ndarray) -> tuple[str, str]:
    """The first place where two lists differ, with both values."""
    if found.shape != expected.shape:
        return f"{found.size} numbers", f"{expected.size} by its tokens"
    at = int(np.argmax(~_near(found, expected)))
    return f"{found.ravel()[at]} at {at}", f"{expected.ravel()[at]} by its tokens"
