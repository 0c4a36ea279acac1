"""Near-lossless gates: limits on what pruning may change, and two answers on a candidate.

v1, the rule as published, on point values: PASS or FAIL. Evidence, by two one-sided tests at 5 %: is the difference shown to be
within its limit, shown to be beyond it, or neither? A difference that is merely not significant is not equivalence.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import ParameterError
from ..files import read_typed
from .compare import Comparison, compare
from .resampling import Interval
from .results import Result

PASS, FAIL, INCOMPLETE = "PASS", "FAIL", "INCOMPLETE"
EQUIVALENT, DIFFERENT, UNDECIDED = "EQUIVALENT", "DIFFERENT", "UNDECIDED"
ROUNDING = 1e-9  # a difference of decimals that equals its limit passes in floating point too
MOST_TIMES = 1000  # what would take more than so many times the blocks that there are is not worth a number


@dataclass(frozen=True)
class Gates:
    """|dPPL| <= min(ppl_absolute, ppl_relative * base PPL), |dCC| <= cc_rate, |d mean p| <= mean_prob, JS2D <= js2d."""

    name: str
    primary_pack: str
    primary_seq_lens: tuple[int, ...]
    limits: dict[str, float]

    def ppl_limit(self, base_ppl: float) -> float:
        """The smaller of the two, NaN if one is: it must not pass for want of a limit."""
        return float(np.minimum(self.limits["ppl_absolute"], self.limits["ppl_relative"] * base_ppl))


@dataclass(frozen=True)
class Check:
    """One gate at one sequence length.

    value, status: v1's. interval, evidence: None where nothing was recorded to resample. blocks_to_decide: how many blocks in
    all would decide, if the value stays, where evidence is UNDECIDED; None where that is beyond MOST_TIMES as many.
    """

    gate: str
    seq_len: int
    value: float
    limit: float
    status: str
    interval: Interval | None
    evidence: str | None
    blocks_to_decide: int | None


@dataclass(frozen=True)
class Verdict:
    """A candidate's two answers. missing: primary sequence lengths that are not there; warnings: sentences.

    evidence: None where a length is missing, or a check has none and no other decides.
    """

    label: str
    status: str
    evidence: str | None
    checks: tuple[Check, ...]
    missing: tuple[int, ...]
    warnings: tuple[str, ...]
    comparisons: dict[int, Comparison]  # per primary sequence length

    def status_at(self, seq_len: int) -> str:
        return _worst({c.status for c in self.checks if c.seq_len == seq_len})


def read_gates(path: str | Path) -> Gates:
    """Raises ParameterError unless the file is a set of gates with every limit, a number, and a primary sequence length."""
    from .schema import GatesFile

    found = read_typed(Path(path), GatesFile, ParameterError, "gates: the project's own are in params/gates/")
    return Gates(found.name, found.primary_pack, tuple(found.primary_seq_lens), found.limits.model_dump())


def judge(candidate: Result, baseline: Result, gates: Gates) -> Verdict:
    """Every gate at every primary sequence length. A length missing on either side makes the verdict INCOMPLETE."""
    checks: list[Check] = []
    comparisons: dict[int, Comparison] = {}
    missing = []
    for seq_len in gates.primary_seq_lens:
        key = (gates.primary_pack, seq_len)
        if key not in candidate.entries or key not in baseline.entries:
            missing.append(seq_len)
            continue
        comparisons[seq_len] = compare(candidate, baseline, *key)
        checks += _checks(comparisons[seq_len], gates, seq_len, baseline.entries[key])
    return Verdict(
        label=candidate.label,
        status=_worst({c.status for c in checks} | ({INCOMPLETE} if missing else set())),
        evidence=None if missing else _combined([c.evidence for c in checks]),
        checks=tuple(checks),
        missing=tuple(missing),
        warnings=tuple(_warnings(candidate, baseline)),
        comparisons=comparisons,
    )


def _worst(statuses: set[str]) -> str:
    return next((s for s in (FAIL, INCOMPLETE, PASS) if s in statuses), INCOMPLETE)


def _combined(answers: list[str | None]) -> str | None:
    """One DIFFERENT decides against; EQUIVALENT takes all of them."""
    if DIFFERENT in answers:
        return DIFFERENT
    if not answers or None in answers:
        return None
    return EQUIVALENT if set(answers) == {EQUIVALENT} else UNDECIDED


def _warnings(candidate: Result, baseline: Result) -> list[str]:
    found = []
    if saw_its_rows(candidate):
        found.append("its experts may have been chosen on rows that it is judged on")
    if trained_on_its_rows(candidate):
        found.append("it may have been trained on rows that it is judged on")
    if dtypes_differ(candidate, baseline):
        found.append(f"scored in {candidate.meta['dtype']}, the baseline in {baseline.meta['dtype']}")
    return found


def saw_its_rows(result: Result) -> bool:
    """Whether the ranking behind a candidate may have seen the rows it is scored on: the splits are not calib / eval."""
    chosen_by = result.meta.get("keep_set")
    if not chosen_by or "ranking_rows" not in chosen_by:
        return False
    return _may_share_rows(chosen_by["ranking_rows"], result)


def trained_on_its_rows(result: Result) -> bool:
    """Whether a recovered model may have been trained on the rows it is scored on."""
    recovered, rows = result.meta.get("recovered"), []
    while recovered:
        rows.append(recovered["text"]["rows"])
        recovered = recovered.get("init")
    return any(_may_share_rows(found, result) for found in rows)


def _may_share_rows(rows: str, result: Result) -> bool:
    return {rows, result.meta.get("rows")} != {"calib", "eval"}


def dtypes_differ(candidate: Result, baseline: Result) -> bool:
    """Whether both files say in which type their model ran, and the types differ: part of the difference is rounding."""
    types = {candidate.meta.get("dtype"), baseline.meta.get("dtype")}
    return None not in types and len(types) == 2


def _checks(comparison: Comparison, gates: Gates, seq_len: int, base: dict) -> list[Check]:
    limits, js2d = gates.limits, comparison.js2d
    ppl_limit, blocks = gates.ppl_limit(base["model"]["ppl"]), len((base["model"].get("blocks") or {}).get("kept", ()))
    deltas = (
        ("dPPL", comparison.ppl, ppl_limit),
        ("dCC", comparison.cc, limits["cc_rate"]),
        ("d mean p", comparison.mean_prob, limits["mean_prob"]),
    )
    drawn, alone = (
        comparison.sample is None or comparison.sample.count > 1,
        (UNDECIDED, None),
    )  # one unit has no interval
    checks = []
    for gate, delta, limit in deltas:
        found = evidence(delta.value, delta.interval, -limit, limit, blocks) if drawn else alone
        checks.append(
            Check(gate, seq_len, delta.value, limit, _status(abs(delta.value), limit), delta.interval, *found)
        )
    # A divergence has no lower limit.
    found = evidence(js2d.estimate, js2d.interval, -math.inf, limits["js2d"], blocks) if drawn else alone
    status = _status(js2d.value, limits["js2d"])
    return [*checks, Check("JS2D", seq_len, js2d.value, limits["js2d"], status, js2d.interval, *found)]


def _status(size: float, limit: float) -> str:
    return PASS if size <= limit + ROUNDING else FAIL  # a NaN is not below


def evidence(
    value: float | None, interval: Interval | None, lowest: float, highest: float, blocks: int
) -> tuple[str | None, int | None]:
    """(what the interval shows of limits ``lowest`` to ``highest``, blocks that would decide where it shows neither)."""
    if interval is None:
        return None, None
    low, high = interval
    if lowest - ROUNDING <= low and high <= highest + ROUNDING:
        return EQUIVALENT, None
    if high < lowest - ROUNDING or low > highest + ROUNDING:
        return DIFFERENT, None
    return UNDECIDED, _blocks_to_decide(value, interval, lowest, highest, blocks)


def _blocks_to_decide(value: float, interval: Interval, lowest: float, highest: float, blocks: int) -> int | None:
    """The interval's reaches above and below the value shrink with the root of the blocks, until a limit is out of them."""
    below, above = value - interval[0], interval[1] - value
    if lowest <= value <= highest:
        needed = [(below, value - lowest), (above, highest - value)]
    elif value > highest:
        needed = [(below, value - highest)]
    else:
        needed = [(above, lowest - value)]
    times = max(reach**2 / room**2 if room > 0 else math.inf for reach, room in needed)
    return math.ceil(times * blocks - ROUNDING * blocks) if blocks and times <= MOST_TIMES else None
