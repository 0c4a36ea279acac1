"""The report on pruned models: verdicts first, then tables and curves, as HTML, Markdown, CSV and JSON."""

from dataclasses import dataclass
from pathlib import Path

from ..errors import ResultError
from ..evaluation.compare import Comparison, compare
from ..evaluation.gates import PASS, UNDECIDED, Gates, Verdict, judge
from ..evaluation.results import Result
from ..files import write_atomically, write_json
from . import figures

VERDICT_SCHEMA = "eaft-verdict/1"


@dataclass(frozen=True)
class Row:
    """One model on one pack and sequence length; comparison is None for the baseline."""

    label: str
    criterion: str | None
    keep_n: int
    pack: str
    seq_len: int
    model: dict
    comparison: Comparison | None
    gate: str


@dataclass(frozen=True)
class Report:
    """Everything the files are made from; ``best`` is the passing model with the fewest experts, if any passes."""

    baseline: Result
    candidates: list[Result]
    gates: Gates
    verdicts: list[Verdict]
    rows: list[Row]

    @property
    def best(self) -> Verdict | None:
        passing = [v for v in self.verdicts if v.status == PASS]

        def experts_then_cost(verdict: Verdict) -> tuple:
            kept = self.keep_n(verdict)  # an earlier file does not say: it comes last
            return (kept is None, kept or 0, max(c.ppl.value for c in verdict.comparisons.values()))

        return min(passing, key=experts_then_cost, default=None)

    @property
    def headline(self) -> str:
        """One sentence that answers the question."""
        total = experts_kept(self.baseline)
        if self.best is None:
            return f"None of {len(self.verdicts)} candidates passes {self.gates.name}."
        passing = sum(v.status == PASS for v in self.verdicts)
        return (
            f"{self.best.label} passes {self.gates.name} with {self.keep_n(self.best) or '?'} of {total or '?'} experts "
            f"per layer{self._bytes_saved(self.best.label)}; {passing} of {len(self.verdicts)} candidates pass."
        )

    def keep_n(self, verdict: Verdict) -> int | None:
        return next(experts_kept(c) for c in self.candidates if c.label == verdict.label)

    def _bytes_saved(self, label: str) -> str:
        before = self.baseline.meta.get("bytes_total")
        after = next(c.meta.get("bytes_total") for c in self.candidates if c.label == label)
        return f", {1 - after / before:.1%} of the bytes gone" if before and after else ""

    def figure(self):
        """Keep-count curves of every criterion with at least one keep-set, or None."""
        return _curve(self)


def build(results: list[Result], baseline: str, gates: Gates) -> Report:
    """Compare every result with the one labelled ``baseline``. Raises ResultError when it is not there or rows differ."""
    by_label = {r.label: r for r in results}
    if baseline not in by_label:
        raise ResultError(f"baseline: no result is labelled {baseline!r}; there are {sorted(by_label)}")
    base = by_label.pop(baseline)
    candidates = sorted(by_label.values(), key=lambda r: (-(experts_kept(r) or 0), r.label))
    verdicts = [judge(c, base, gates) for c in candidates]
    rows = [_row(base, base, key, None, gates.primary_pack) for key in base.entries]
    for candidate, verdict in zip(candidates, verdicts, strict=True):
        rows += [
            _row(candidate, base, key, verdict, gates.primary_pack) for key in candidate.entries if key in base.entries
        ]
    return Report(base, candidates, gates, verdicts, rows)


def write(report: Report, out_dir: str | Path) -> list[Path]:
    """report.html, report.md, results.csv and verdict.json; returns their paths."""
    out_dir = Path(out_dir)
    texts = {"report.html": _html(report), "report.md": markdown(report), "results.csv": _csv(report)}
    for name, text in texts.items():
        write_atomically(out_dir / name, lambda temporary, text=text: Path(temporary).write_text(text))
    write_json(out_dir / "verdict.json", verdict_content(report))
    return [out_dir / name for name in (*texts, "verdict.json")]


def experts_kept(result: Result) -> int | None:
    """Experts per layer of the model that was scored; None where an earlier file does not say."""
    keep_set = result.meta.get("keep_set") or {}
    return keep_set.get("keep_n", result.meta.get("num_experts"))


def markdown(report: Report) -> str:
    """The verdicts and one table per pack and sequence length, in Markdown."""
    parts = [f"# Pruning report: {report.gates.name}", report.headline, "## Verdicts"]
    parts.append(
        _table(["model", "verdict", "why"], [[v.label, v.status, "; ".join(v.reasons)] for v in report.verdicts])
    )
    for pack, seq_len in sorted({(r.pack, r.seq_len) for r in report.rows}):
        rows = [r for r in report.rows if (r.pack, r.seq_len) == (pack, seq_len)]
        parts += [f"## {pack}, {seq_len} tokens", _table(COLUMNS, [list(cells_of(r)) for r in rows])]
    parts.append("## What the numbers mean\n\n" + "\n".join(f"- {note}" for note in notes(report)))
    return "\n\n".join(parts) + "\n"


COLUMNS = "model,keep,ppl,dPPL,95 % interval,CC rate,dCC,mean p,d mean p,JS2D,floor,KL,top-1,gate".split(",")


def cells_of(row: Row) -> tuple[str, ...]:
    """One table row, formatted."""
    m, c = row.model, row.comparison
    start = (row.label, str(row.keep_n or "?"), f"{m['ppl']:.3f}")
    if c is None:
        return (
            *start,
            "0.000",
            "",
            f"{m['cc_rate']:.6f}",
            "+0.000000",
            f"{m['mean_prob']:.4f}",
            "+0.0000",
            "0.0000",
            "",
            "",
            "",
            row.gate,
        )
    interval = f"[{c.ppl.interval[0]:+.3f}, {c.ppl.interval[1]:+.3f}]" if c.ppl.interval else "no blocks"
    marker = " (binned)" if c.binned else ""
    return (
        *start,
        f"{c.ppl.value:+.3f}",
        interval,
        f"{c.cc_rate_at_base:.6f}{marker}",
        f"{c.cc.value:+.6f}",
        f"{m['mean_prob']:.4f}",
        f"{c.mean_prob.value:+.4f}",
        f"{c.js2d:.4f}",
        f"{c.js2d_floor:.4f}",
        "" if c.kl_to_base is None else f"{c.kl_to_base:.4f}",
        "" if c.top1_agreement is None else f"{c.top1_agreement:.1%}",
        row.gate,
    )


def notes(report: Report) -> list[str]:
    """How to read the tables, with the facts of this report filled in."""
    meta = report.baseline.meta
    lengths = " and ".join(map(str, report.gates.primary_seq_lens))
    limits = report.gates.limits
    found = [
        f"Gates ({report.gates.name}): {report.gates.primary_pack} at {lengths} tokens, all must pass: |dPPL| <= "
        f"min({limits['ppl_absolute']}, {limits['ppl_relative']:.0%} of the baseline's PPL), |dCC| <= {limits['cc_rate']}, "
        f"|d mean p| <= {limits['mean_prob']}, JS2D <= {limits['js2d']}.",
        "CC rate: confident conflicts, tokens with p and H both under the baseline's thresholds.",
        "Intervals: 95 %, paired bootstrap over blocks.",
        "JS2D: divergence of the (p, H) histograms. Its floor is what chance gives: the two models' values swapped at "
        "random, token by token. A value above the limit by no more than the floor decides nothing (UNDECIDED).",
        "KL and top-1: mean KL(baseline, candidate) over the full vocabulary, and share of equal arg-max, where both "
        "models ran in one pass.",
        f"Evaluated rows: {meta.get('rows', 'unknown')}; {meta.get('num_blocks', '?')} blocks per sequence length; "
        f"{meta.get('gpu_name') or meta.get('device', 'device unknown')}, {meta.get('dtype', 'dtype unknown')}.",
    ]
    if any(r.comparison and r.comparison.binned for r in report.rows):
        found.append(
            "(binned): per-token values were not at hand; conflicts and floors come from histogram bins. Files without schema "
            "do not record rows or tokenizer, so that those agree is not checked."
        )
    return found


def verdict_content(report: Report) -> dict:
    """The content of verdict.json."""
    criteria = {row.label: row.criterion for row in report.rows}
    return {
        "schema": VERDICT_SCHEMA,
        "gates": report.gates.name,
        "baseline": report.baseline.label,
        "headline": report.headline,
        "best": report.best.label if report.best else None,
        "models": {
            v.label: {
                "verdict": v.status,
                "keep_n": report.keep_n(v),
                "criterion": criteria[v.label],
                "reasons": list(v.reasons),
                "checks": [vars(c) for c in v.checks],
            }
            for v in report.verdicts
        },
    }


def summary(content: dict) -> str:
    """verdict.json as text: by criterion and keep count the largest |dPPL| over primary lengths, passes starred."""
    cells: dict[tuple[str, int], tuple[float, str]] = {}
    for model in content["models"].values():
        deltas = [c["value"] for c in model["checks"] if c["gate"] == "dPPL"]
        key = (model["criterion"], model["keep_n"])
        if None in key or not deltas:
            continue
        found = (max(deltas, key=abs), model["verdict"])
        # One keep-set may have been scored twice, virtually and on disk: the worse one is shown.
        cells[key] = max(cells.get(key, found), found, key=lambda cell: (cell[1] != PASS, abs(cell[0])))
    counts = sorted({n for _, n in cells}, reverse=True)
    missing = (float("inf"), "")
    criteria = sorted({c for c, _ in cells}, key=lambda c: [abs(cells.get((c, n), missing)[0]) for n in counts])

    def text(cell: tuple[float, str] | None) -> str:
        return "" if cell is None else f"{cell[0]:+.3f}" + {PASS: "*", UNDECIDED: "?"}.get(cell[1], " ")

    lines = [
        f"{content['gates']} against {content['baseline']}: dPPL by experts kept (* passes every gate, ? too few tokens)"
    ]
    lines.append(f"{'':<16}" + "".join(f"{'keep ' + str(n):>12}" for n in counts))
    lines += [f"{c:<16}" + "".join(f"{text(cells.get((c, n))):>12}" for n in counts) for c in criteria]
    return "\n".join([*lines, "", content["headline"]])


def _row(result: Result, base: Result, key: tuple[str, int], verdict: Verdict | None, primary_pack: str) -> Row:
    pack, seq_len = key
    comparison, gate = None, "baseline"
    if verdict is not None:
        judged = pack == primary_pack and seq_len in verdict.comparisons
        comparison = verdict.comparisons[seq_len] if judged else compare(result, base, pack, seq_len)
        gate = verdict.status_at(seq_len) if judged else ""
    criterion = (result.meta.get("keep_set") or {}).get("criterion")
    return Row(
        result.label, criterion, experts_kept(result), pack, seq_len, result.entries[key]["model"], comparison, gate
    )


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows]]
    return "\n".join(lines)


def _csv(report: Report) -> str:
    import pandas as pd

    return pd.DataFrame([_csv_row(r, report) for r in report.rows]).to_csv(index=False)


def _csv_row(row: Row, report: Report) -> dict:
    m, c = row.model, row.comparison
    values = {
        "model": row.label,
        "criterion": row.criterion,
        "keep_n": row.keep_n,
        "pack": row.pack,
        "seq_len": row.seq_len,
        "ppl": m["ppl"],
        "dppl": c.ppl.value if c else 0.0,
        "cc_rate": m["cc_rate"],
        "cc_rate_at_base": c.cc_rate_at_base if c else m["cc_rate"],
        "dcc": c.cc.value if c else 0.0,
        "mean_prob": m["mean_prob"],
        "dmean_prob": c.mean_prob.value if c else 0.0,
        "mean_entropy": m["mean_entropy"],
        "js2d": c.js2d if c else 0.0,
        "js2d_floor": c.js2d_floor if c else None,
        "kl_to_base": c.kl_to_base if c else None,
        "top1_agreement": c.top1_agreement if c else None,
        "gate": row.gate,
        "binned": c.binned if c else report.baseline.binned,
        "kept_tokens": m["kept_tokens"],
    }
    for name in ("ppl", "cc", "mean_prob"):
        interval = getattr(c, name).interval if c else None
        values[f"d{name}_low"], values[f"d{name}_high"] = interval or (None, None)
    return values


def _curve(report: Report):
    points = [
        {
            "criterion": row.criterion,
            "keep_n": row.keep_n,
            "seq_len": row.seq_len,
            "dppl": row.comparison.ppl.value,
            "low": row.comparison.ppl.interval and row.comparison.ppl.interval[0],
            "high": row.comparison.ppl.interval and row.comparison.ppl.interval[1],
        }
        for row in report.rows
        if row.comparison and row.criterion and row.pack == report.gates.primary_pack
    ]
    limits = {
        length: report.gates.ppl_limit(report.baseline.entries[report.gates.primary_pack, length]["model"]["ppl"])
        for length in report.gates.primary_seq_lens
        if any(point["seq_len"] == length for point in points)
    }
    return figures.keep_curve(points, limits, experts_kept(report.baseline)) if limits else None


def _html(report: Report) -> str:
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("eaftlib.report", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    keys = sorted({(r.pack, r.seq_len) for r in report.rows}, key=lambda k: (k[0] != report.gates.primary_pack, k))
    tables = {key: [(r, cells_of(r)) for r in report.rows if (r.pack, r.seq_len) == key] for key in keys}
    base = report.baseline.entries
    primary = [(report.gates.primary_pack, length) for length in report.gates.primary_seq_lens]
    landscapes = [
        figures.landscape(base[key]["model"], f"{report.baseline.label}, {key[0]}, {key[1]} tokens").svg()
        for key in primary
        if key in base
    ]
    curve = report.figure()
    return environment.get_template("report.html.jinja").render(
        report=report,
        columns=COLUMNS,
        tables=tables,
        notes=notes(report),
        curve=curve.svg() if curve else "",
        landscapes=landscapes,
        experts_kept={c.label: experts_kept(c) for c in report.candidates},
        num_experts=experts_kept(report.baseline),
    )
