"""How to read a report's numbers, with the facts of its results filled in."""

from ..evaluation.gates import Gates, dtypes_differ
from ..evaluation.results import Result


def notes(candidates: list[Result], base: Result, gates: Gates, binned: bool) -> tuple[str, ...]:
    """binned: whether a candidate's conflicts or floors come from histogram bins."""
    meta, limits = base.meta, gates.limits
    lengths = " and ".join(map(str, gates.primary_seq_lens))
    found = [
        f"Gates ({gates.name}): {gates.primary_pack} at {lengths} tokens, all must pass: |dPPL| <= "
        f"min({limits['ppl_absolute']}, {limits['ppl_relative']:.0%} of the baseline's PPL), |dCC| <= {limits['cc_rate']}, "
        f"|d mean p| <= {limits['mean_prob']}, JS2D <= {limits['js2d']}.",
        "v1: PASS or FAIL by these limits on the point values alone, as published. INCOMPLETE: a length is missing.",
        "Evidence: EQUIVALENT where the whole 90 % interval lies inside the limits (two one-sided tests at 5 %), DIFFERENT "
        "where it lies outside, else UNDECIDED. A difference that is merely not significant is not equivalence.",
        "Intervals: 90 %, paired bootstrap over conversations; over blocks where a file does not say which conversation a "
        "token belongs to.",
        "CC rate: confident conflicts, tokens with p and H both under the baseline's thresholds.",
        "JS2D: divergence of the (p, H) histograms, as v1 judges it. Its estimate is without the bias of few tokens, and may "
        "be below zero; the interval is the estimate's. The floor is what chance gives: the two models' values swapped at "
        "random, token by token.",
        "trained: share of the whole model's parameters that training changed afterwards, to give the whole model's "
        "next-token distributions again; the expert matrices are not among them. '-': nothing was trained.",
        "KL and top-1: mean KL(baseline, candidate) over the full vocabulary, and share of equal arg-max, where both "
        "models ran in one pass.",
        f"Evaluated rows: {meta.get('rows', 'unknown')}; {_blocks(meta.get('num_blocks', '?'))}; "
        f"{meta.get('gpu_name') or meta.get('device', 'device unknown')}, {meta.get('dtype', 'dtype unknown')}.",
    ]
    rounded = [f"{c.label} in {c.meta['dtype']}" for c in candidates if dtypes_differ(c, base)]
    if rounded:
        found.append(
            f"Precision: the baseline was scored in {meta['dtype']}, {', '.join(rounded)}. Part of their difference is "
            "rounding, not pruning."
        )
    if binned:
        found.append(
            "(binned): per-token values were not at hand; conflicts and floors come from histogram bins. Files without schema "
            "do not record rows or tokenizer, so that those agree is not checked."
        )
    return tuple(found)


def _blocks(num_blocks: int | str | dict[str, int]) -> str:
    if isinstance(num_blocks, dict):
        return ", ".join(f"{count} blocks of {length} tokens" for length, count in num_blocks.items())
    return f"{num_blocks} blocks per sequence length"
