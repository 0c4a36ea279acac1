"""Pruned models and their verdicts: how they are grouped, which one is best, what a sentence says about them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ..evaluation.compare import Sample
from ..evaluation.gates import DIFFERENT, EQUIVALENT, FAIL, PASS, UNDECIDED, Check, Gates, Verdict, judge
from ..evaluation.results import Result

RECOVERED = "recovered"
OTHER = "other checkpoints"


@dataclass(frozen=True)
class Recovered:
    """What training changed in a pruned model, whose expert matrices stay as they were.

    parameters_share: trained parameters of all of the whole model's; tokens: trained on, repeats counted.
    """

    parameters_share: float
    tokens: int

    @property
    def trained(self) -> str:
        """The share with two digits: that of routers alone is far below a percent."""
        return f"{float(f'{100 * self.parameters_share:.2g}'):g}%"

    @property
    def trained_on(self) -> str:
        return f"{self.tokens / 1e6:,.1f} M tokens" if self.tokens >= 1e6 else f"{self.tokens:,} tokens"


@dataclass(frozen=True)
class Candidate:
    """A pruned model and its verdict. keep_n of num_experts experts per layer; None where an earlier file does not say.

    recovered: None where nothing was trained. bytes_saved: share of the baseline's bytes. kept_tokens: by primary
    sequence length, where both models were scored.
    """

    label: str
    criterion: str | None
    keep_n: int | None
    num_experts: int | None
    recovered: Recovered | None
    bytes_total: int | None
    bytes_saved: float | None
    kept_tokens: dict[int, int]
    verdict: Verdict

    @property
    def method(self) -> str:
        """What it is grouped by."""
        return RECOVERED if self.recovered else self.criterion or OTHER

    @property
    def status(self) -> str:
        return self.verdict.status

    @property
    def evidence(self) -> str | None:
        return self.verdict.evidence

    @property
    def checks(self) -> tuple[Check, ...]:
        return self.verdict.checks

    @property
    def samples(self) -> dict[int, Sample]:
        """What the intervals rest on, by primary sequence length; without those that have none."""
        return {length: c.sample for length, c in self.verdict.comparisons.items() if c.sample}

    @property
    def blocks_to_decide(self) -> dict[int, int]:
        """By sequence length, how many blocks in all would decide every gate that is undecided and says so.

        Empty where one gate has decided against the candidate already.
        """
        needed: dict[int, int] = {}
        for check in self.checks if self.evidence != DIFFERENT else ():
            if check.evidence == UNDECIDED and check.blocks_to_decide:
                needed[check.seq_len] = max(needed.get(check.seq_len, 0), check.blocks_to_decide)
        return needed

    @property
    def worst_in_limits(self) -> float:
        """The value that is the largest multiple of its limit, as that multiple; infinite where nothing was judged."""
        return max((abs(c.value) / c.limit if c.limit > 0 else math.inf for c in self.checks), default=math.inf)


@dataclass(frozen=True)
class Group:
    """Candidates of one method, most experts first."""

    method: str
    candidates: tuple[Candidate, ...]


def candidate(result: Result, base: Result, gates: Gates) -> Candidate:
    verdict = judge(result, base, gates)
    before, after = base.meta.get("bytes_total"), result.meta.get("bytes_total")
    return Candidate(
        label=result.label,
        criterion=criterion(result),
        keep_n=experts_kept(result),
        num_experts=experts_kept(base),
        recovered=recovered(result),
        bytes_total=after,
        bytes_saved=1 - after / before if before and after else None,
        kept_tokens={n: result.entries[gates.primary_pack, n]["model"]["kept_tokens"] for n in verdict.comparisons},
        verdict=verdict,
    )


def experts_kept(result: Result) -> int | None:
    """Experts per layer of the model that was scored; None where an earlier file does not say."""
    keep_set = result.meta.get("keep_set") or {}
    return keep_set.get("keep_n", result.meta.get("num_experts"))


def criterion(result: Result) -> str | None:
    return (result.meta.get("keep_set") or {}).get("criterion")


def recovered(result: Result) -> Recovered | None:
    found = result.meta.get("recovered")
    return Recovered(found["parameters_share"], found["tokens"]) if found else None


def best_of(candidates: Iterable[Candidate]) -> Candidate | None:
    """Of those that pass, the one with the fewest experts; of equals the one that costs least perplexity."""

    def experts_then_cost(found: Candidate) -> tuple:
        # An earlier file does not say how many experts it has: it comes last.
        return found.keep_n is None, found.keep_n or 0, max(c.value for c in found.checks if c.gate == "dPPL")

    return min((c for c in candidates if c.status == PASS), key=experts_then_cost, default=None)


def nearest_of(candidates: Iterable[Candidate]) -> Candidate | None:
    """The one whose worst value is the smallest multiple of its limit."""
    return min((c for c in candidates if c.checks), key=lambda c: (c.worst_in_limits, c.label), default=None)


def grouped(candidates: Iterable[Candidate]) -> tuple[Group, ...]:
    """By method: first those that pass, with the fewest experts; then the one with the candidate nearest to passing."""
    methods: dict[str, list[Candidate]] = {}
    for found in candidates:
        methods.setdefault(found.method, []).append(found)
    groups = [
        Group(method, tuple(sorted(found, key=lambda c: (-(c.keep_n or 0), c.label))))
        for method, found in methods.items()
    ]
    return tuple(sorted(groups, key=_passes_then_nearest))


def _passes_then_nearest(group: Group) -> tuple:
    best = best_of(group.candidates)
    fewest = best.keep_n or math.inf if best else math.inf
    return best is None, fewest, min(c.worst_in_limits for c in group.candidates), group.method


def headline(candidates: tuple[Candidate, ...], gates: Gates) -> str:
    """One sentence that answers the question."""
    best = best_of(candidates)
    if best is None:
        return none_passes(len(candidates), gates.name)
    trained, saved = "", f", {best.bytes_saved:.1%} of the bytes gone" if best.bytes_saved is not None else ""
    if best.recovered:
        trained = ", every kept expert matrix as it was, "
        trained += f"{best.recovered.trained} of the parameters trained on {best.recovered.trained_on}"
        saved = saved.replace(", ", "; ")
    passing = sum(c.status == PASS for c in candidates)
    return (
        f"{best.label} passes {gates.name} with {best.keep_n or '?'} of {best.num_experts or '?'} experts "
        f"per layer{trained}{saved}; {how_many_pass(passing, len(candidates))}"
    )


def none_passes(count: int, gates: str) -> str:
    return f"None of {count} candidates passes {gates}."


def how_many_pass(passing: int, count: int) -> str:
    """How a headline of several candidates ends."""
    return f"{passing} of {count} candidates pass."


def next_steps(candidates: tuple[Candidate, ...], gates: Gates) -> tuple[str, ...]:
    """What would answer what is still open, the most useful first."""
    best = best_of(candidates)
    steps = [_confirm(best)] if best else []
    steps += [_between(group) for group in grouped(candidates)]
    steps += [_more_blocks(candidates, best), _complete(candidates, gates), _recover(candidates, best)]
    return tuple(step for step in steps if step)


def _confirm(best: Candidate) -> str:
    if best.evidence == EQUIVALENT:
        return f"{best.label} passes and its differences are shown to be within the limits: it can be used as it is."
    if best.evidence is None:
        return (
            f"{best.label} passes, but not every gate has an interval: evaluate it with per-token values, on more "
            "conversations, to see how sure that is."
        )
    needed = blocks_text(best.blocks_to_decide)
    with_blocks = f" {needed} would decide." if needed else ""
    return f"{best.label} passes, but its intervals reach past a limit: evaluate it on more blocks.{with_blocks}"


def _between(group: Group) -> str:
    """Where a criterion's answer changes, if there are counts in between that nobody tried."""
    counts = [(c.keep_n, c.status) for c in group.candidates if c.keep_n]
    passing = min((n for n, status in counts if status == PASS), default=None)
    failing = max((n for n, status in counts if status == FAIL and n < (passing or 0)), default=None)
    if group.method in (RECOVERED, OTHER) or passing is None or failing is None or passing - failing < 2:
        return ""
    return f"{group.method} passes with {passing} experts and fails with {failing}: try a count between them."


def _more_blocks(candidates: tuple[Candidate, ...], best: Candidate | None) -> str:
    open_ones = [c for c in candidates if c.evidence == UNDECIDED and c is not best]
    if not open_ones:
        return ""
    cheapest = min(open_ones, key=lambda c: (not c.blocks_to_decide, sum(c.blocks_to_decide.values()), c.label))
    needed = blocks_text(cheapest.blocks_to_decide)
    first = f" Cheapest to settle: {cheapest.label}, with {needed}." if needed else ""
    others = "one candidate" if len(open_ones) == 1 else f"{len(open_ones)} candidates"
    return f"The evidence on {others} is undecided: evaluate more blocks.{first}"


def _complete(candidates: tuple[Candidate, ...], gates: Gates) -> str:
    lengths = sorted({length for c in candidates for length in c.verdict.missing})
    if not lengths:
        return ""
    names = ", ".join(c.label for c in candidates if c.verdict.missing)
    return f"Evaluate {gates.primary_pack} at {' and '.join(map(str, lengths))} tokens, which is missing for {names}."


def _recover(candidates: tuple[Candidate, ...], best: Candidate | None) -> str:
    """Training is worth trying below the smallest that passes, at a count that more blocks would not save."""
    below = [c for c in candidates if c.keep_n and c.status == FAIL and (best is None or c.keep_n < (best.keep_n or 0))]
    open_or_tried = {c.keep_n for c in below if c.evidence == UNDECIDED} | {c.keep_n for c in candidates if c.recovered}
    untried = [c.keep_n for c in below if c.keep_n not in open_or_tried]
    if not untried:
        return ""
    return f"With {max(untried)} experts nothing passes untrained: 05_recover trains the small tensors of such a model."


def blocks_text(blocks: dict[int, int]) -> str:
    """'3,200 blocks of 1,024 tokens', '3,200 blocks of 1,024 and 900 of 2,048 tokens', or nothing."""
    parts = [f"{count:,} of {length:,}" for length, count in sorted(blocks.items())]
    return f"{' and '.join(parts)} tokens".replace(" of", " blocks of", 1) if parts else ""
