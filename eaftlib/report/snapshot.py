"""The quality snapshot: a baseline and its candidates on the primary pack, one table per primary sequence length.

Columns, signs and rounding are those of the published snapshot of gpt-oss-20b, so that the tables can be laid beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ResultError
from ..evaluation.gates import PASS, Gates, Verdict, judge
from ..evaluation.results import Result
from ..files import read_json
from .markdown import plain

PUBLISHED_SCHEMA = "eaft-published/1"
_HEADER = (
    "| model | ppl | ΔPPL vs base | CC rate | ΔCC vs base | mean p | Δ mean p | gate |\n"
    "|---|---:|---:|---:|---:|---:|---:|---|"
)
_BESIDE_HEADER = (
    "| model | ppl | published | ΔPPL | published | ΔCC | published | Δ mean p | published | gate | published |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|---|"
)


@dataclass(frozen=True)
class Scores:
    """A model at one sequence length; cc_rate: at the baseline's thresholds, dppl to dmean_prob: against the baseline."""

    ppl: float
    dppl: float
    cc_rate: float
    dcc: float
    mean_prob: float
    dmean_prob: float
    gate: str


@dataclass(frozen=True)
class Published:
    """Figures that others published, and where: by sequence length and label."""

    source: str
    scores: dict[int, dict[str, Scores]]


def read_published(path: Path) -> Published:
    """Raises ResultError when the file is no table of published figures."""
    content = read_json(path, ResultError, "the project's own is params/gpt-oss-20b/snapshot/published.json")
    if content.get("schema") != PUBLISHED_SCHEMA:
        raise ResultError(f"{path}: schema is {content.get('schema')!r}, expected {PUBLISHED_SCHEMA!r}")
    scores = {
        int(length): {label: Scores(**row) for label, row in rows.items()}
        for length, rows in content["seq_lens"].items()
    }
    return Published(content["source"], scores)


def markdown(results: Sequence[Result], baseline: str, gates: Gates, published: Published | None = None) -> str:
    """The whole document. Candidates stand in the order of ``results``; one without a length has a row of empty cells there.

    Raises ResultError when no result is labelled ``baseline``, when it lacks a primary length, or when rows differ.
    """
    by_label = {result.label: result for result in results}
    if baseline not in by_label:
        raise ResultError(f"--baseline: no result is labelled {baseline!r}; there are {sorted(by_label)}")
    base = by_label.pop(baseline)
    if lacking := [n for n in gates.primary_seq_lens if (gates.primary_pack, n) not in base.entries]:
        raise ResultError(
            f"{base.path} has no {gates.primary_pack} at {lacking}; evaluate it there, or give that result"
        )
    verdicts = [judge(result, base, gates) for result in by_label.values()]
    tables = {
        length: _table(base, list(by_label.values()), verdicts, gates, length) for length in gates.primary_seq_lens
    }
    parts = [_preface(base, list(by_label.values()), gates), f"## Results ({plain(gates.primary_pack)})"]
    parts += [f"### Seq len {length}\n\n{_tabular(rows)}" for length, rows in tables.items()]
    if published:
        parts.append(f"## Beside the published figures\n\nThe published ones: {plain(published.source)}.")
        parts += [
            f"### Seq len {length}, ours and published\n\n{_beside(tables[length], published.scores[length])}"
            for length in tables
            if tables[length].keys() & published.scores.get(length, {}).keys()
        ]
    return "\n\n".join(parts) + "\n"


def _table(
    base: Result, candidates: list[Result], verdicts: list[Verdict], gates: Gates, length: int
) -> dict[str, Scores | None]:
    """Label -> scores, the baseline first; None where a candidate was not scored at this length."""
    own = base.entries[gates.primary_pack, length]["model"]
    rows: dict[str, Scores | None] = {
        base.label: Scores(own["ppl"], 0.0, own["cc_rate"], 0.0, own["mean_prob"], 0.0, f"{PASS} (baseline)")
    }
    for candidate, verdict in zip(candidates, verdicts, strict=True):
        rows[candidate.label] = _scores(candidate, verdict, gates, length) if length in verdict.comparisons else None
    return rows


def _scores(candidate: Result, verdict: Verdict, gates: Gates, length: int) -> Scores:
    model, found = candidate.entries[gates.primary_pack, length]["model"], verdict.comparisons[length]
    return Scores(
        ppl=model["ppl"],
        dppl=found.ppl.value,
        cc_rate=found.cc_rate_at_base,
        dcc=found.cc.value,
        mean_prob=model["mean_prob"],
        dmean_prob=found.mean_prob.value,
        gate=verdict.status_at(length),
    )


def _tabular(rows: dict[str, Scores | None]) -> str:
    lines = [_HEADER]
    for label, s in rows.items():
        cells = (
            [""] * 6 + ["not scored"] if s is None else [f"{s.ppl:.3f}", _dppl(s), f"{s.cc_rate:.6f}", f"{s.dcc:+.6f}"]
        )
        if s is not None:
            cells += [f"{s.mean_prob:.4f}", f"{s.dmean_prob:+.4f}", s.gate]
        lines.append(_line(plain(label), *cells))
    return "\n".join(lines)


def _beside(rows: dict[str, Scores | None], published: dict[str, Scores]) -> str:
    """Rows that both have, each figure of ours followed by the published one."""
    lines = [_BESIDE_HEADER]
    for label, ours in rows.items():
        if ours is not None and label in published:
            theirs = published[label]
            pairs = zip(_beside_cells(ours), _beside_cells(theirs), strict=True)
            lines.append(_line(plain(label), *(cell for pair in pairs for cell in pair)))
    return "\n".join(lines)


def _beside_cells(s: Scores) -> list[str]:
    return [f"{s.ppl:.3f}", _dppl(s), f"{s.dcc:+.6f}", f"{s.dmean_prob:+.4f}", s.gate]


def _dppl(scores: Scores) -> str:
    return "0.000" if scores.gate.endswith("(baseline)") else f"{scores.dppl:+.3f}"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _preface(base: Result, candidates: list[Result], gates: Gates) -> str:
    """What was scored, on what, and how; facts that a file does not record are said to be unknown."""
    meta = base.meta
    lines = [
        "# Quality snapshot",
        "",
        f"- Pack: {plain(gates.primary_pack)} of {plain(meta.get('dataset_repo', 'unknown'))}, "
        f"rows: {plain(meta.get('rows', 'unknown'))}, blocks: {_blocks(meta.get('num_blocks', 'unknown'))}",
        f"- Entropy over the top {meta.get('entropy_topk', '?')} logits, thresholds at the {meta.get('cc_quantile', '?')} "
        "quantile. CC rate: at the baseline's thresholds",
        f"- Gate: {plain(gates.name)}, on the point values; a row passes where all its gates do, JS2D included",
        "",
        "## Models",
        "",
    ]
    return "\n".join(lines + [f"- {plain(r.label)}: {_described(r)}" for r in (base, *candidates)])


def _described(result: Result) -> str:
    """Model, experts kept, and which rows chose them."""
    meta = result.meta
    keep = meta.get("keep_set") or {}
    parts = [
        f"{plain(meta.get('model_id', 'model unknown'))}, {keep.get('keep_n', meta.get('num_experts', '?'))} experts a layer"
    ]
    if keep:
        parts.append(f"chosen by {plain(keep.get('criterion'))} on rows: {plain(keep.get('ranking_rows', 'unknown'))}")
    return ", ".join([*parts, f"scored in {plain(meta.get('dtype', 'a type that is not recorded'))}"])


def _blocks(num_blocks: int | str | dict[str, int]) -> str:
    if isinstance(num_blocks, dict):
        return ", ".join(f"{count} of {length} tokens" for length, count in num_blocks.items())
    return str(num_blocks)
