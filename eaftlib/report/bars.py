"""Gates as bars: where a value, its interval and its limits lie on a line, and the same in words."""

from dataclasses import dataclass

from ..evaluation.compare import JS2D
from ..evaluation.gates import DIFFERENT, EQUIVALENT, FAIL, INCOMPLETE, PASS, UNDECIDED, Check
from .candidates import Candidate, blocks_text

# Of a check's value; its limit has no sign.
FORMATS = {"dPPL": "+.3f", "dCC": "+.5f", "d mean p": "+.4f", "JS2D": ".4f"}
# Beside every colour stands a shape.
SHAPES = {PASS: "✓", FAIL: "✗", INCOMPLETE: "◌", EQUIVALENT: "≈", DIFFERENT: "≠", UNDECIDED: "?"}
_REACH = 2.0  # a bar ends at so many times its limit
_MARGIN = 4.0  # percent at both ends, so that a mark there is whole


@dataclass(frozen=True)
class Bar:
    """One check on a line from 0 to 100 %.

    band: between the limits. zero, value, estimate: points; the estimate is JS2D's. interval: None where there is none.
    beyond: -1 or 1 where the value lies outside the line, to which it is then cut, else 0.
    """

    check: Check
    band: tuple[float, float]
    zero: float
    value: float
    interval: tuple[float, float] | None
    estimate: float | None
    beyond: int

    @property
    def text(self) -> str:
        return format(self.check.value, FORMATS[self.check.gate])

    @property
    def limit_text(self) -> str:
        sign = "" if self.check.gate == "JS2D" else "±"
        return sign + format(self.check.limit, FORMATS[self.check.gate].lstrip("+"))

    @property
    def shape(self) -> str:
        return SHAPES[self.check.status]

    @property
    def description(self) -> str:
        """All of it in words: what a pointer or a screen reader gets."""
        check = self.check
        form = FORMATS[check.gate]
        parts = [f"{check.gate} at {check.seq_len} tokens: {self.text}, limit {self.limit_text}: {check.status}"]
        if check.interval:
            of_what = "90 % interval of the unbiased estimate" if check.gate == "JS2D" else "90 % interval"
            parts.append(f"{of_what} {check.interval[0]:{form}} to {check.interval[1]:{form}}: {check.evidence}")
        else:
            parts.append("no interval is recorded")
        if check.evidence == UNDECIDED and check.blocks_to_decide:
            parts.append(f"{blocks_text({check.seq_len: check.blocks_to_decide})} would decide")
        return "; ".join(parts)


def bars(candidate: Candidate) -> dict[str, list[Bar]]:
    """By gate, a bar per primary sequence length that is there."""
    found: dict[str, list[Bar]] = {}
    for check in candidate.checks:
        js2d = candidate.verdict.comparisons[check.seq_len].js2d if check.gate == "JS2D" else None
        found.setdefault(check.gate, []).append(bar(check, js2d))
    return found


def bar(check: Check, js2d: JS2D | None = None) -> Bar:
    """A limit of zero or none at all has no scale: every value is at the end then."""
    end = _REACH * check.limit
    start = -0.25 * check.limit if js2d else -end

    def place(value: float) -> float:
        share = (value - start) / (end - start) if end > 0 else (value > 0) + 0.5 * (value == 0)
        return round(_MARGIN + (100 - 2 * _MARGIN) * min(max(share, 0.0), 1.0), 2)

    return Bar(
        check=check,
        band=(place(0.0 if js2d else -check.limit), place(check.limit)),
        zero=place(0.0),
        value=place(check.value),
        interval=tuple(map(place, check.interval)) if check.interval else None,
        estimate=place(js2d.estimate) if js2d and js2d.estimate is not None else None,
        beyond=(check.value > end) - (check.value < start),
    )
