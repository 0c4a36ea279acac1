"""Near-lossless gates: limits on what pruning may change, and the verdict on a candidate."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import ParameterError
from ..files import read_json
from .compare import Comparison, compare
from .results import Result

SCHEMA = "eaft-gates/1"
PASS, FAIL, UNDECIDED, INCOMPLETE = "PASS", "FAIL", "UNDECIDED", "INCOMPLETE"
ROUNDING = 1e-9  # a difference of decimals that equals its limit passes in floating point too
LIMITS = ("ppl_absolute", "ppl_relative", "cc_rate", "mean_prob", "js2d")


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
    """One gate at one sequence length."""

    gate: str
    seq_len: int
    value: float
    limit: float
    status: str
    reason: str


@dataclass(frozen=True)
class Verdict:
    """A candidate's verdict: the worst of its checks, with a sentence for everything that is not a plain pass."""

    label: str
    status: str
    reasons: tuple[str, ...]
    checks: tuple[Check, ...]
    comparisons: dict[int, Comparison]  # per primary sequence length

    def status_at(self, seq_len: int) -> str:
        return _worst({c.status for c in self.checks if c.seq_len == seq_len})


def read_gates(path: str | Path) -> Gates:
    """Raises ParameterError unless the file is a set of gates with every limit, a number, and a primary sequence length."""
    content = read_json(Path(path), ParameterError, "gates: the project's own are in params/gates/")
    limits = content.get("limits", {})
    complete = {"schema", "name", "primary_pack", "primary_seq_lens", "limits"} <= set(content)
    if not complete or content["schema"] != SCHEMA or set(limits) != set(LIMITS) or not content["primary_seq_lens"]:
        raise ParameterError(
            f"gates: {path} has {content}; expected schema {SCHEMA!r}, a name, a primary_pack, primary_seq_lens and limits "
            f"for {', '.join(LIMITS)}"
        )
    if not all(isinstance(limit, int | float) and math.isfinite(limit) for limit in limits.values()):
        raise ParameterError(f"gates: {path} has limits {limits}; expected finite numbers")
    return Gates(content["name"], content["primary_pack"], tuple(content["primary_seq_lens"]), limits)


def judge(candidate: Result, baseline: Result, gates: Gates) -> Verdict:
    """Every gate at every primary sequence length. A length missing on either side makes the verdict INCOMPLETE."""
    checks: list[Check] = []
    comparisons: dict[int, Comparison] = {}
    reasons: list[str] = []
    for seq_len in gates.primary_seq_lens:
        missing = [r.label for r in (candidate, baseline) if (gates.primary_pack, seq_len) not in r.entries]
        if missing:
            reasons.append(f"{gates.primary_pack} at {seq_len} is missing for {', '.join(missing)}")
            continue
        comparison = compare(candidate, baseline, gates.primary_pack, seq_len)
        base_ppl = baseline.entries[gates.primary_pack, seq_len]["model"]["ppl"]
        comparisons[seq_len] = comparison
        checks += _checks(comparison, gates, seq_len, base_ppl)
    status = _worst({c.status for c in checks} | ({INCOMPLETE} if reasons else set()))
    reasons += [c.reason for c in checks if c.reason]
    if saw_its_rows(candidate):
        reasons.append("its experts may have been chosen on rows that it is judged on")
    if trained_on_its_rows(candidate):
        reasons.append("it may have been trained on rows that it is judged on")
    if dtypes_differ(candidate, baseline):
        reasons.append(f"scored in {candidate.meta['dtype']}, the baseline in {baseline.meta['dtype']}")
    return Verdict(candidate.label, status, tuple(reasons), tuple(checks), comparisons)


def _worst(statuses: set[str]) -> str:
    return next((s for s in (FAIL, INCOMPLETE, UNDECIDED, PASS) if s in statuses), INCOMPLETE)


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


def _checks(comparison: Comparison, gates: Gates, seq_len: int, base_ppl: float) -> list[Check]:
    limits = gates.limits
    deltas = (
        ("dPPL", comparison.ppl, gates.ppl_limit(base_ppl), ".3f"),
        ("dCC", comparison.cc, limits["cc_rate"], ".5f"),
        ("d mean p", comparison.mean_prob, limits["mean_prob"], ".4f"),
    )
    checks = []
    for gate, delta, limit, form in deltas:
        status = PASS if abs(delta.value) <= limit + ROUNDING else FAIL
        reason = ""
        if status == FAIL:
            reason = f"{gate} at {seq_len}: {delta.value:+{form}}, limit {limit:{form}}"
        elif delta.interval and not all(abs(end) <= limit for end in delta.interval):  # an end may be NaN
            low, high = delta.interval
            reason = f"{gate} at {seq_len} passes, but its interval [{low:+{form}}, {high:+{form}}] reaches past {limit:{form}}"
        checks.append(Check(gate, seq_len, delta.value, limit, status, reason))
    return [*checks, _js_check(comparison, limits["js2d"], seq_len)]


def _js_check(comparison: Comparison, limit: float, seq_len: int) -> Check:
    """JS2D is biased upward on small evaluations: above the limit by no more than its noise floor, it decides nothing."""
    value, floor = comparison.js2d, comparison.js2d_floor
    if value <= limit + ROUNDING:
        return Check("JS2D", seq_len, value, limit, PASS, "")
    if value - floor <= limit + ROUNDING:
        reason = f"JS2D at {seq_len}: {value:.4f}, limit {limit}, noise floor {floor:.4f}: too few tokens to decide"
        return Check("JS2D", seq_len, value, limit, UNDECIDED, reason)
    reason = f"JS2D at {seq_len}: {value:.4f}, limit {limit}, noise floor {floor:.4f}"
    return Check("JS2D", seq_len, value, limit, FAIL, reason)
