"""The report's tables, each a list of columns, and their renderings as Markdown, CSV and plain text."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..evaluation.compare import Delta
from ..evaluation.gates import PASS, UNDECIDED
from .model import Candidate, Recovered, Report, Row


@dataclass(frozen=True)
class Column:
    """A table's column: its name, what it takes from a row, and a format specification for what it took.

    A value of None is an empty cell.
    """

    name: str
    value: Callable[..., object]
    format: str = ""

    def text(self, row: object) -> str:
        value = self.value(row)
        return "" if value is None else format(value, self.format)


def _kept(candidate: Candidate) -> str:
    return f"{candidate.keep_n or '?'} of {candidate.num_experts or '?'}"


def _ppl_difference(row: Row) -> str:
    return "0.000" if row.is_baseline else f"{row.comparison.ppl.value:+.3f}"


def _ppl_interval(row: Row) -> str:
    if row.comparison.ppl.interval:
        return "[{:+.3f}, {:+.3f}]".format(*row.comparison.ppl.interval)
    return "" if row.is_baseline else "no blocks"


def _cc_rate(row: Row) -> str:
    marker = " (binned)" if row.comparison.binned and not row.is_baseline else ""
    return f"{row.comparison.cc_rate_at_base:.6f}{marker}"


def _ends(name: str, delta: Callable[[Row], Delta]) -> list[Column]:
    """Both ends of a difference's interval."""

    def end(index: int) -> Callable[[Row], float | None]:
        return lambda row: (delta(row).interval or (None, None))[index]

    return [Column(f"{name}_low", end(0)), Column(f"{name}_high", end(1))]


_TRAINED = Column("trained", lambda row: row.recovered.trained if row.recovered else "-")

VERDICTS = [
    Column("model", lambda c: c.label),
    _TRAINED,
    Column("verdict", lambda c: c.status),
    Column("why", lambda c: "; ".join(c.reasons)),
]
VERDICTS_AND_SIZES = [VERDICTS[0], Column("keep", _kept), *VERDICTS[1:]]

SCORES = [
    Column("model", lambda r: r.label),
    Column("keep", lambda r: r.keep_n or "?"),
    _TRAINED,
    Column("ppl", lambda r: r.ppl, ".3f"),
    Column("dPPL", _ppl_difference),
    Column("95 % interval", _ppl_interval),
    Column("CC rate", _cc_rate),
    Column("dCC", lambda r: r.comparison.cc.value, "+.6f"),
    Column("mean p", lambda r: r.mean_prob, ".4f"),
    Column("d mean p", lambda r: r.comparison.mean_prob.value, "+.4f"),
    Column("JS2D", lambda r: r.comparison.js2d, ".4f"),
    Column("floor", lambda r: r.comparison.js2d_floor, ".4f"),
    Column("KL", lambda r: r.comparison.kl_to_base, ".4f"),
    Column("top-1", lambda r: r.comparison.top1_agreement, ".1%"),
    Column("gate", lambda r: r.gate),
]

# What results.csv holds, as numbers.
VALUES = [
    Column("model", lambda r: r.label),
    Column("criterion", lambda r: r.criterion),
    Column("keep_n", lambda r: r.keep_n),
    Column("pack", lambda r: r.pack),
    Column("seq_len", lambda r: r.seq_len),
    Column("ppl", lambda r: r.ppl),
    Column("dppl", lambda r: r.comparison.ppl.value),
    Column("cc_rate", lambda r: r.cc_rate),
    Column("cc_rate_at_base", lambda r: r.comparison.cc_rate_at_base),
    Column("dcc", lambda r: r.comparison.cc.value),
    Column("mean_prob", lambda r: r.mean_prob),
    Column("dmean_prob", lambda r: r.comparison.mean_prob.value),
    Column("mean_entropy", lambda r: r.mean_entropy),
    Column("js2d", lambda r: r.comparison.js2d),
    Column("js2d_floor", lambda r: r.comparison.js2d_floor),
    Column("kl_to_base", lambda r: r.comparison.kl_to_base),
    Column("top1_agreement", lambda r: r.comparison.top1_agreement),
    Column("gate", lambda r: r.gate),
    Column("binned", lambda r: r.comparison.binned),
    Column("kept_tokens", lambda r: r.kept_tokens),
    *_ends("dppl", lambda r: r.comparison.ppl),
    *_ends("dcc", lambda r: r.comparison.cc),
    *_ends("dmean_prob", lambda r: r.comparison.mean_prob),
    Column("trained_parameters_share", lambda r: r.recovered and r.recovered.parameters_share),
    Column("trained_tokens", lambda r: r.recovered and r.recovered.tokens),
]


def markdown(report: Report) -> str:
    """The verdicts and one table per pack and sequence length, in Markdown."""
    parts = [f"# Pruning report: {report.gates}", report.headline]
    parts += ["## Verdicts", _markdown_table(VERDICTS, report.candidates)]
    for (pack, seq_len), rows in report.tables.items():
        parts += [f"## {pack}, {seq_len} tokens", _markdown_table(SCORES, rows)]
    parts.append("## What the numbers mean\n\n" + "\n".join(f"- {note}" for note in report.notes))
    return "\n\n".join(parts) + "\n"


def csv(report: Report) -> str:
    """One line per model, pack and sequence length, every number in full."""
    import pandas as pd

    return pd.DataFrame({c.name: [c.value(row) for row in report.rows] for c in VALUES}).to_csv(index=False)


def summary(*contents: dict) -> str:
    """One or more verdict.json as text: by criterion and keep count the largest |dPPL| over primary lengths, passes starred.

    Below them a line for each recovered model, which says what was trained: it is no point of a criterion's row.
    """
    models = [
        model | {"label": label}
        for content in contents
        for label, model in content["models"].items()
        if _largest_dppl(model) is not None
    ]
    recovered = [m for m in models if m.get("recovered") and m["keep_n"]]  # earlier files do not have the key
    cells: dict[tuple[str, int], tuple[float, str]] = {}
    for model in models:
        key = (model["criterion"], model["keep_n"])
        if None in key or model.get("recovered"):
            continue
        found = (_largest_dppl(model), model["verdict"])
        # One keep-set may have been scored twice, virtually and on disk: the worse one is shown.
        cells[key] = max(cells.get(key, found), found, key=lambda cell: (cell[1] != PASS, abs(cell[0])))
    counts = sorted({n for _, n in cells} | {m["keep_n"] for m in recovered}, reverse=True)
    missing = (float("inf"), "")
    criteria = sorted({c for c, _ in cells}, key=lambda c: [abs(cells.get((c, n), missing)[0]) for n in counts])

    def cost(count: int) -> Callable[[str], str]:
        return lambda criterion: _starred(*cells[criterion, count]) if (criterion, count) in cells else ""

    width = max([16, *(len(m["label"]) + 2 for m in recovered)])
    columns = [Column("", str, f"<{width}"), *(Column(f"keep {n}", cost(n), ">12") for n in counts)]
    first = contents[0]
    title = (
        f"{first['gates']} against {first['baseline']}: dPPL by experts kept (* passes every gate, ? too few tokens)"
    )
    lines = ["".join(format(c.name, c.format) for c in columns)]
    lines += ["".join(c.text(criterion) for c in columns) for criterion in criteria]
    lines += _recovered_lines(recovered, counts, width)
    return "\n".join([title, *lines, "", *(content["headline"] for content in contents)])


def _largest_dppl(model: dict) -> float | None:
    return max((c["value"] for c in model["checks"] if c["gate"] == "dPPL"), key=abs, default=None)


def _recovered_lines(models: list[dict], counts: list[int], width: int) -> list[str]:
    """After an empty line each recovered model's dPPL in its column, and to the right of it what was trained."""
    lines = [""] if models else []
    for model in sorted(models, key=lambda m: (-m["keep_n"], abs(_largest_dppl(m)))):
        place = width + 12 * (1 + counts.index(model["keep_n"]))
        dppl = _starred(_largest_dppl(model), model["verdict"])
        what = Recovered(**model["recovered"])
        end = f"{dppl:>{place - len(model['label'])}}  {what.trained} trained on {what.trained_on}"
        lines.append(model["label"] + end)
    return lines


def _starred(dppl: float, status: str) -> str:
    return f"{dppl:+.3f}" + {PASS: "*", UNDECIDED: "?"}.get(status, " ")


def _markdown_table(columns: list[Column], rows: Iterable) -> str:
    header = [[c.name for c in columns], ["---"] * len(columns)]
    return "\n".join(
        "| " + " | ".join(cells) + " |" for cells in [*header, *([c.text(r) for c in columns] for r in rows)]
    )
