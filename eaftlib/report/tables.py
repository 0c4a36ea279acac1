"""The report's tables, each a list of columns, and their renderings as Markdown, CSV and plain text."""

import csv as csv_format
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..evaluation.compare import Comparison, Delta
from ..evaluation.gates import FAIL, PASS, UNDECIDED, Check
from .bars import FORMATS
from .candidates import Candidate, Recovered, blocks_text, how_many_pass, none_passes
from .markdown import plain
from .model import Report, Row


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


@dataclass(frozen=True)
class Trust:
    """What a candidate's numbers at one primary sequence length rest on."""

    candidate: Candidate
    seq_len: int
    comparison: Comparison


def trust(report: Report) -> list[Trust]:
    return [
        Trust(candidate, seq_len, comparison)
        for group in report.groups
        for candidate in group.candidates
        for seq_len, comparison in candidate.verdict.comparisons.items()
    ]


def rests_on(candidate: Candidate) -> str:
    """'812 conversations; 247,467 and 247,310 tokens', by primary sequence length where they differ."""
    samples = list(dict.fromkeys(map(_sample, candidate.samples.values())))
    tokens = [f"{count:,}" for count in candidate.kept_tokens.values()]
    if not tokens:
        return "nothing that the baseline was scored on"
    return "; ".join(filter(None, [" and ".join(samples), f"{' and '.join(tokens)} tokens"]))


def _sample(sample) -> str:
    return f"{sample.count:,} {sample.unit}"


def _kept(candidate: Candidate) -> str:
    return f"{candidate.keep_n or '?'} of {candidate.num_experts or '?'}"


def _trained(found: Candidate | Row) -> str:
    return found.recovered.trained if found.recovered else "-"


def reason(check: Check) -> str:
    """A failed check in a short cell: 'dPPL@1024 +0.110 > 0.099'."""
    form = FORMATS[check.gate]
    sign, limit = (">", check.limit) if check.value > 0 else ("<", -check.limit)
    return f"{check.gate}@{check.seq_len} {check.value:{form}} {sign} {limit:{form.lstrip('+')}}"


def _reasons(candidate: Candidate) -> str:
    missing = [f"missing@{length}" for length in candidate.verdict.missing]
    return "; ".join([reason(c) for c in candidate.checks if c.status == FAIL] + missing)


def _compared(take: Callable[[Comparison], object]) -> Callable[[Row], object]:
    """Of a row that the baseline was scored beside; None of any other."""
    return lambda row: take(row.comparison) if row.comparison else None


def _interval(take: Callable[[Comparison], tuple[float, float] | None], form: str) -> Callable[[Row], str | None]:
    return lambda row: None if row.comparison is None or row.is_baseline else _range(take(row.comparison), form)


def _range(ends: tuple[float, float] | None, form: str) -> str:
    return f"{ends[0]:{form}} to {ends[1]:{form}}" if ends else "not recorded"


def _undecided(trust: Trust) -> str:
    """Gates whose evidence is neither way, or that none of them is."""
    here = [check for check in trust.candidate.checks if check.seq_len == trust.seq_len]
    if all(check.evidence is None for check in here):
        return "not recorded"
    return ", ".join(check.gate for check in here if check.evidence == UNDECIDED) or "none"


def _cc_rate(row: Row) -> str | None:
    if row.comparison is None:
        return None
    return f"{row.comparison.cc_rate_at_base:.6f}" + (" (binned)" if row.binned and not row.is_baseline else "")


def _end(take: Callable[[Comparison], tuple[float, float] | None], index: int) -> Callable[[Row], float | None]:
    return _compared(lambda comparison: (take(comparison) or (None, None))[index])


def _ends(name: str, take: Callable[[Comparison], Delta]) -> list[Column]:
    """Both ends of a difference's interval."""
    return [Column(f"{name}_{end}", _end(lambda c: take(c).interval, i)) for i, end in enumerate(("low", "high"))]


VERDICTS = [
    Column("model", lambda c: c.label),
    Column("method", lambda c: c.method),
    Column("keep", _kept),
    Column("trained", _trained),
    Column("bytes saved", lambda c: c.bytes_saved, ".1%"),
    Column("v1", lambda c: c.status),
    Column("evidence", lambda c: c.evidence or "not for every gate"),
    Column("beyond a limit", _reasons),
    Column("would decide", lambda c: blocks_text(c.blocks_to_decide)),
    Column("note", lambda c: "; ".join(c.verdict.warnings)),
]

SCORES = [
    Column("model", lambda r: r.label),
    Column("keep", lambda r: r.keep_n or "?"),
    Column("trained", _trained),
    Column("ppl", lambda r: r.ppl, ".3f"),
    Column("dPPL", _compared(lambda c: c.ppl.value), "+.3f"),
    Column("90 % interval", _interval(lambda c: c.ppl.interval, "+.3f")),
    Column("CC rate", _cc_rate),
    Column("dCC", _compared(lambda c: c.cc.value), "+.6f"),
    Column("mean p", lambda r: r.mean_prob, ".4f"),
    Column("d mean p", _compared(lambda c: c.mean_prob.value), "+.4f"),
    Column("JS2D", _compared(lambda c: c.js2d.value), ".4f"),
    Column("unbiased", _compared(lambda c: c.js2d.estimate), ".4f"),
    Column("floor", _compared(lambda c: c.js2d.floor), ".4f"),
    Column("KL", _compared(lambda c: c.kl_to_base), ".4f"),
    Column("top-1", _compared(lambda c: c.top1_agreement), ".1%"),
    Column("gate", lambda r: r.gate),
]

TRUST = [
    Column("model", lambda t: t.candidate.label),
    Column("length", lambda t: t.seq_len, ","),
    Column("rests on", lambda t: _sample(t.comparison.sample) if t.comparison.sample else "not recorded"),
    Column("tokens", lambda t: t.candidate.kept_tokens[t.seq_len], ","),
    Column("JS2D", lambda t: t.comparison.js2d.value, ".4f"),
    Column("unbiased", lambda t: t.comparison.js2d.estimate, ".4f"),
    Column("90 % interval of it", lambda t: _range(t.comparison.js2d.interval, ".4f")),
    Column("floor", lambda t: t.comparison.js2d.floor, ".4f"),
    Column("undecided", _undecided),
    Column(
        "would decide", lambda t: blocks_text({n: c for n, c in t.candidate.blocks_to_decide.items() if n == t.seq_len})
    ),
    Column("values", lambda t: "binned" if t.comparison.binned else "per token"),
]

# What results.csv holds, as numbers.
VALUES = [
    Column("model", lambda r: r.label),
    Column("criterion", lambda r: r.criterion),
    Column("keep_n", lambda r: r.keep_n),
    Column("pack", lambda r: r.pack),
    Column("seq_len", lambda r: r.seq_len),
    Column("ppl", lambda r: r.ppl),
    Column("dppl", _compared(lambda c: c.ppl.value)),
    Column("cc_rate", lambda r: r.cc_rate),
    Column("cc_rate_at_base", _compared(lambda c: c.cc_rate_at_base)),
    Column("dcc", _compared(lambda c: c.cc.value)),
    Column("mean_prob", lambda r: r.mean_prob),
    Column("dmean_prob", _compared(lambda c: c.mean_prob.value)),
    Column("mean_entropy", lambda r: r.mean_entropy),
    Column("js2d", _compared(lambda c: c.js2d.value)),
    Column("js2d_floor", _compared(lambda c: c.js2d.floor)),
    Column("kl_to_base", _compared(lambda c: c.kl_to_base)),
    Column("top1_agreement", _compared(lambda c: c.top1_agreement)),
    Column("gate", lambda r: r.gate),
    Column("binned", lambda r: r.binned),
    Column("kept_tokens", lambda r: r.kept_tokens),
    *_ends("dppl", lambda c: c.ppl),
    *_ends("dcc", lambda c: c.cc),
    *_ends("dmean_prob", lambda c: c.mean_prob),
    Column("trained_parameters_share", lambda r: r.recovered and r.recovered.parameters_share),
    Column("trained_tokens", lambda r: r.recovered and r.recovered.tokens),
    Column("js2d_unbiased", _compared(lambda c: c.js2d.estimate)),
    *(Column(f"js2d_{end}", _end(lambda c: c.js2d.interval, i)) for i, end in enumerate(("low", "high"))),
    Column("sample_unit", _compared(lambda c: c.sample and c.sample.unit)),
    Column("sample_count", _compared(lambda c: c.sample and c.sample.count)),
]


def markdown(report: Report) -> str:
    """The verdicts, one table per pack and sequence length, and what to do next, in Markdown."""
    ordered = [candidate for group in report.groups for candidate in group.candidates]
    parts = [f"# Pruning report: {plain(report.gates.name)}", plain(report.headline)]
    parts += ["## Verdicts", _markdown_table(VERDICTS, ordered)]
    for (pack, seq_len), rows in report.tables.items():
        parts += [f"## {plain(pack)}, {seq_len} tokens", _markdown_table(SCORES, rows)]
    for title, lines in (("What next", report.next_steps), ("What the numbers mean", report.notes)):
        if lines:
            parts.append(f"## {title}\n\n" + "\n".join(f"- {plain(line)}" for line in lines))
    return "\n\n".join(parts) + "\n"


def _markdown_table(columns: list[Column], rows: Iterable) -> str:
    header = [[c.name for c in columns], ["---"] * len(columns)]
    lines = [*header, *([plain(c.text(r)) for c in columns] for r in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def csv(report: Report) -> str:
    """One line per model, pack and sequence length, every number in full."""
    text = io.StringIO()
    writer = csv_format.writer(text, lineterminator="\n")
    writer.writerow([c.name for c in VALUES])
    writer.writerows([_cell(c.value(row)) for c in VALUES] for row in report.rows)
    return text.getvalue()


def _cell(value: object) -> object:
    """Text that a spreadsheet would take for a formula is quoted with an apostrophe; numbers never are."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def summary(*contents: dict) -> str:
    """One or more verdict.json as text: by criterion and keep count the largest |dPPL| over primary lengths, passes starred.

    Below them a line for each recovered model, which says what was trained: it is no point of a criterion's row. The last
    line answers for all of them together.
    """
    models = [
        model | {"label": label}
        for content in contents
        for label, model in content["models"].items()
        if _largest_dppl(model) is not None
    ]
    recovered = [m for m in models if m.get("recovered") and m["keep_n"]]  # earlier files do not have the key
    cells: dict[tuple[str, int], dict] = {}
    for model in models:
        key = (model["criterion"], model["keep_n"])
        if None in key or model.get("recovered"):
            continue
        # One keep-set may have been scored twice, virtually and on disk: the worse one is shown.
        cells[key] = max(cells.get(key, model), model, key=lambda m: (m["verdict"] != PASS, abs(_largest_dppl(m))))
    counts = sorted({n for _, n in cells} | {m["keep_n"] for m in recovered}, reverse=True)
    criteria = sorted({c for c, _ in cells}, key=lambda c: [_cost(cells.get((c, n))) for n in counts])

    def cost(count: int) -> Callable[[str], str]:
        return lambda criterion: _marked(cells[criterion, count]) if (criterion, count) in cells else ""

    width = max([16, *(len(m["label"]) + 2 for m in recovered)])
    columns = [Column("", str, f"<{width}"), *(Column(f"keep {n}", cost(n), ">12") for n in counts)]
    first = contents[0]
    title = f"{first['gates']} against {first['baseline']}: dPPL by experts kept (* passes every gate, ? too few tokens to say)"
    lines = ["".join(format(c.name, c.format) for c in columns)]
    lines += ["".join(c.text(criterion) for c in columns) for criterion in criteria]
    lines += _recovered_lines(recovered, counts, width)
    return "\n".join([title, *lines, "", _headline(contents)])


def _largest_dppl(model: dict) -> float | None:
    return max((c["value"] for c in model["checks"] if c["gate"] == "dPPL"), key=abs, default=None)


def _cost(model: dict | None) -> float:
    return abs(_largest_dppl(model)) if model else float("inf")


def _headline(contents: tuple[dict, ...]) -> str:
    """That of the passing model with the fewest experts over all verdicts, with all their candidates counted."""
    models = [model for content in contents for model in content["models"].values()]
    passing = [content for content in contents if content["best"]]
    if len(contents) == 1:
        return contents[0]["headline"]
    if not passing:
        return none_passes(len(models), contents[0]["gates"])
    best = min(passing, key=lambda content: content["models"][content["best"]]["keep_n"] or float("inf"))
    answer, _, _ = best["headline"].rpartition("; ")
    return f"{answer}; {how_many_pass(sum(m['verdict'] == PASS for m in models), len(models))}"


def _recovered_lines(models: list[dict], counts: list[int], width: int) -> list[str]:
    """After an empty line each recovered model's dPPL in its column, and to the right of it what was trained."""
    lines = [""] if models else []
    for model in sorted(models, key=lambda m: (-m["keep_n"], _cost(m))):
        place = width + 12 * (1 + counts.index(model["keep_n"]))
        what = Recovered(**model["recovered"])
        end = f"{_marked(model):>{place - len(model['label'])}}  {what.trained} trained on {what.trained_on}"
        lines.append(model["label"] + end)
    return lines


def _marked(model: dict) -> str:
    """The largest dPPL; '*' where every gate passes, '?' where the evidence (of earlier files, the verdict) is undecided."""
    undecided = UNDECIDED in (model.get("evidence"), model["verdict"])
    marks = "*" * (model["verdict"] == PASS) + "?" * undecided
    return f"{_largest_dppl(model):+.3f}{marks:<2}"
