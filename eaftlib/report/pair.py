"""Two results side by side, for notebooks: a table of differences, and the charts of both."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ResultError
from ..evaluation import compare as evaluation
from ..evaluation.results import Result, read
from . import charts

if TYPE_CHECKING:
    import plotly.graph_objects as go

HEADER = ("", "left", "right", "right minus left", "90 % interval")


@dataclass(frozen=True)
class Pair:
    """Two results on one pack and sequence length; differences are right minus left, at the left one's thresholds.

    Displayed by IPython as a table and two figures, printed as the table.
    """

    left: Result
    right: Result
    pack: str
    seq_len: int
    comparison: evaluation.Comparison

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """The table's cells as text, in the order of HEADER; empty where a file lacks the value, no row where both do."""
        left, right = self._models
        found = self.comparison
        js2d = found.js2d
        rows = [
            _row("PPL", left["ppl"], right["ppl"], ".4f", found.ppl),
            _row("confident conflicts at left's thresholds", left["cc_rate"], found.cc_rate_at_base, ".5f", found.cc),
            _row("confident conflicts at own thresholds", left["cc_rate"], right["cc_rate"], ".5f"),
            _row("mean p", left["mean_prob"], right["mean_prob"], ".4f", found.mean_prob),
            _row("mean H", left["mean_entropy"], right["mean_entropy"], ".4f"),
            ("JS2D, nats", "", "", _number(js2d.value, ".4f"), ""),
            ("JS2D without its bias", "", "", _number(js2d.estimate, ".4f"), _interval(js2d.interval, ".4f")),
            ("JS2D that chance gives (floor)", "", "", _number(js2d.floor, ".4f"), ""),
            ("KL to the whole model, nats", *_numbers(left, right, "kl_to_base", ".4f"), "", ""),
            ("top-1 agreement with it", *_numbers(left, right, "top1_agreement", ".2%"), "", ""),
            ("positions a second, whole pass", *_numbers(left, right, "tok_s_pred", ",.0f"), "", ""),
        ]
        return [row for row in rows if any(row[1:])]

    @property
    def landscapes(self) -> go.Figure:
        return charts.landscapes(*self._models, (self.left.label, self.right.label))

    @property
    def distributions(self) -> go.Figure:
        return charts.distributions(*self._models, (self.left.label, self.right.label))

    @property
    def _models(self) -> tuple[dict, dict]:
        left, right = (result.entries[self.pack, self.seq_len]["model"] for result in (self.left, self.right))
        return left, right

    @property
    def _title(self) -> str:
        sample = self.comparison.sample
        rests = f"{sample.count} {sample.unit}" if sample else "neither conversations nor blocks are recorded"
        binned = "; (binned): from histograms" if self.comparison.binned else ""
        kept = self._models[0]["kept_tokens"]
        return (
            f"{self.right.label} (right) against {self.left.label} (left), {self.pack} at {self.seq_len} tokens: {kept:,} kept "
            f"tokens, {rests}{binned}"
        )

    def __repr__(self) -> str:
        cells = [HEADER, *self.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(HEADER))]
        lines = ["  ".join(f"{c:{'<' if i == 0 else '>'}{widths[i]}}" for i, c in enumerate(row)) for row in cells]
        return "\n".join([self._title, *(line.rstrip() for line in lines)])

    def _repr_html_(self) -> str:
        """The table alone."""
        head = "".join(f"<th scope='col'>{escape(cell)}</th>" for cell in HEADER)
        body = "".join(
            f"<tr><th scope='row' style='text-align:left'>{escape(name)}</th>"
            + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            + "</tr>"
            for name, *cells in self.rows
        )
        return f"<table><caption>{escape(self._title)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def _ipython_display_(self) -> None:
        from IPython.display import display

        # As a bundle, not as itself: that would come back here.
        display({"text/html": self._repr_html_(), "text/plain": repr(self)}, raw=True)
        display(self.landscapes, self.distributions)


def compare(left: str | Path, right: str | Path, pack: str = "UNION", seq_len: int | None = None) -> Pair:
    """The result ``right`` against ``left``, on a pack and a sequence length; None: the shortest that both have.

    Raises ResultError where they share none, or were not made from the same rows, blocks and tokenizer.
    """
    results = read(left), read(right)
    lengths = [{length for name, length in result.entries if name == pack} for result in results]
    common = sorted(lengths[0] & lengths[1])
    if not common:
        raise ResultError(
            f"{left} and {right} share no sequence length of {pack}: they have {sorted(results[0].entries)} and "
            f"{sorted(results[1].entries)}. Choose another pack, or evaluate both at one length."
        )
    chosen = common[0] if seq_len is None else seq_len
    return Pair(*results, pack, chosen, evaluation.compare(results[1], results[0], pack, chosen))


def _row(
    name: str, left: float, right: float, form: str, delta: evaluation.Delta | None = None
) -> tuple[str, str, str, str, str]:
    value, interval = (delta.value, delta.interval) if delta else (right - left, None)
    return name, format(left, form), format(right, form), format(value, f"+{form}"), _interval(interval, f"+{form}")


def _numbers(left: dict, right: dict, name: str, form: str) -> tuple[str, str]:
    return _number(left.get(name), form), _number(right.get(name), form)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _interval(ends: tuple[float, float] | None, form: str) -> str:
    return f"[{ends[0]:{form}}, {ends[1]:{form}}]" if ends else ""
