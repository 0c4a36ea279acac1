"""What a report says, as one typed object; tables, page, notebook and terminal only render it."""

from dataclasses import asdict, dataclass

from ..errors import ResultError
from ..evaluation.compare import JS2D, Comparison, Delta, compare
from ..evaluation.gates import Gates
from ..evaluation.results import Result
from .candidates import (
    Candidate,
    Group,
    Recovered,
    best_of,
    candidate,
    criterion,
    experts_kept,
    grouped,
    headline,
    nearest_of,
    next_steps,
    recovered,
)  # fmt: skip
from .conflicts import ConflictTexts
from .notes import notes
from .saliency import Saliency

SCHEMA = "eaft-verdict/2"


@dataclass(frozen=True)
class Row:
    """One model on one pack and sequence length.

    comparison: with the baseline on the same tokens; None where the baseline was not scored there. entry: the ``model``
    entry of the result file, with the histogram and whatever else was recorded. input: what it was scored on, as far as
    the file says; two rows of one pack and length whose inputs differ are not comparable. gate: status on a primary pack
    and length, "baseline", or nothing.
    """

    label: str
    criterion: str | None
    keep_n: int | None
    recovered: Recovered | None
    pack: str
    seq_len: int
    entry: dict
    input: str | None
    binned: bool
    comparison: Comparison | None
    gate: str
    is_baseline: bool

    @property
    def ppl(self) -> float:
        return self.entry["ppl"]

    @property
    def cc_rate(self) -> float:
        return self.entry["cc_rate"]

    @property
    def mean_prob(self) -> float:
        return self.entry["mean_prob"]

    @property
    def mean_entropy(self) -> float:
        return self.entry["mean_entropy"]

    @property
    def kept_tokens(self) -> int:
        return self.entry["kept_tokens"]


@dataclass(frozen=True)
class Curve:
    """dPPL over experts kept: pruned models' rows on the primary pack, and the dPPL gate per sequence length.

    rows: those with a criterion, and recovered ones, which belong to no criterion's line.
    """

    rows: tuple[Row, ...]
    limits: dict[int, float]
    num_experts: int


@dataclass(frozen=True)
class Landscape:
    """One (p, H) histogram: the ``model`` entry of a result that holds it, and what to write above it."""

    title: str
    seq_len: int
    model: dict


@dataclass(frozen=True)
class Report:
    """Everything that is shown.

    num_experts: of the baseline, per layer. bytes_total: of every model by label, the baseline's too, where its file says.
    """

    gates: Gates
    model_id: str
    baseline: str
    num_experts: int | None
    headline: str
    candidates: tuple[Candidate, ...]
    rows: tuple[Row, ...]
    bytes_total: dict[str, int]
    notes: tuple[str, ...]
    curve: Curve | None
    landscapes: tuple[Landscape, ...]
    saliencies: tuple[Saliency, ...]
    conflicts: tuple[ConflictTexts, ...]

    @property
    def best(self) -> Candidate | None:
        """The passing candidate with the fewest experts, if any passes."""
        return best_of(self.candidates)

    @property
    def nearest(self) -> Candidate | None:
        """The candidate that is nearest to passing, if any was judged at all."""
        return nearest_of(self.candidates)

    @property
    def groups(self) -> tuple[Group, ...]:
        return grouped(self.candidates)

    @property
    def next_steps(self) -> tuple[str, ...]:
        return next_steps(self.candidates, self.gates)

    @property
    def tables(self) -> dict[tuple[str, int], list[Row]]:
        """Rows by pack and sequence length, in that order."""
        keys = sorted({(row.pack, row.seq_len) for row in self.rows})
        return {key: [row for row in self.rows if (row.pack, row.seq_len) == key] for key in keys}

    def content(self) -> dict:
        """The content of verdict.json."""
        return {
            "schema": SCHEMA,
            "gates": self.gates.name,
            "baseline": self.baseline,
            "headline": self.headline,
            "best": self.best.label if self.best else None,
            "models": {c.label: _candidate_content(c) for c in self.candidates},
        }


def _candidate_content(found: Candidate) -> dict:
    return {
        "verdict": found.status,
        "evidence": found.evidence,
        "keep_n": found.keep_n,
        "num_experts": found.num_experts,
        "criterion": found.criterion,
        "recovered": asdict(found.recovered) if found.recovered else None,
        "bytes_total": found.bytes_total,
        "bytes_saved": found.bytes_saved,
        "missing": list(found.verdict.missing),
        "warnings": list(found.verdict.warnings),
        "samples": {
            str(length): asdict(sample) | {"kept_tokens": found.kept_tokens[length]}
            for length, sample in found.samples.items()
        },
        "checks": [asdict(check) for check in found.checks],
    }


def build(
    results: list[Result],
    baseline: str,
    gates: Gates,
    saliencies: tuple[Saliency, ...] = (),
    conflicts: tuple[ConflictTexts, ...] = (),
) -> Report:
    """Compare every result with the one labelled ``baseline``.

    Raises ResultError when it is not there, rows differ, or tokens do not give the numbers beside them.

    saliencies, conflicts: to be shown beside.
    """
    for result in results:
        result.require_reconciled()  # what only the JSON says is shown, too
    by_label = {r.label: r for r in results}
    if baseline not in by_label:
        raise ResultError(f"baseline: no result is labelled {baseline!r}; there are {sorted(by_label)}")
    base = by_label.pop(baseline)
    found = sorted(by_label.values(), key=lambda r: (-(experts_kept(r) or 0), r.label))
    candidates = tuple(candidate(result, base, gates) for result in found)
    rows = [_row(base, key, _with_itself(base, key), "baseline", is_baseline=True) for key in base.entries]
    for result, judged in zip(found, candidates, strict=True):
        rows += _rows(result, base, judged, gates)
    sizes = {r.label: r.meta["bytes_total"] for r in (base, *found) if r.meta.get("bytes_total")}
    return Report(
        gates=gates,
        model_id=base.meta.get("model_id", ""),
        baseline=base.label,
        num_experts=experts_kept(base),
        headline=headline(candidates, gates),
        candidates=candidates,
        rows=tuple(rows),
        bytes_total=sizes,
        notes=notes(found, base, gates, any(r.binned for r in rows if not r.is_baseline)),
        curve=_curve(rows, base, gates),
        landscapes=_landscapes(base, gates),
        saliencies=saliencies,
        conflicts=conflicts,
    )


def _rows(result: Result, base: Result, judged: Candidate, gates: Gates) -> list[Row]:
    """A candidate's rows; compared wherever the baseline was scored too."""
    rows, comparisons = [], judged.verdict.comparisons
    for pack, seq_len in result.entries:
        if pack == gates.primary_pack and seq_len in comparisons:
            comparison, gate = comparisons[seq_len], judged.verdict.status_at(seq_len)
        else:
            shared = (pack, seq_len) in base.entries
            comparison, gate = compare(result, base, pack, seq_len) if shared else None, ""
        rows.append(_row(result, (pack, seq_len), comparison, gate))
    return rows


def _row(
    result: Result, key: tuple[str, int], comparison: Comparison | None, gate: str, is_baseline: bool = False
) -> Row:
    entry = result.entries[key]
    return Row(
        label=result.label,
        criterion=criterion(result),
        keep_n=experts_kept(result),
        recovered=recovered(result),
        pack=key[0],
        seq_len=key[1],
        entry=entry["model"],
        input=entry.get("input_sha256") or entry.get("rows_sha256"),
        binned=comparison.binned if comparison and not is_baseline else result.binned,
        comparison=comparison,
        gate=gate,
        is_baseline=is_baseline,
    )


def _with_itself(base: Result, key: tuple[str, int]) -> Comparison:
    nothing = Delta(0.0, None)
    return Comparison(
        ppl=nothing,
        cc=nothing,
        mean_prob=nothing,
        js2d=JS2D(0.0, None, None, None),
        cc_rate_at_base=base.entries[key]["model"]["cc_rate"],
        sample=None,
        binned=base.binned,
        kl_to_base=None,
        top1_agreement=None,
    )


def _curve(rows: list[Row], base: Result, gates: Gates) -> Curve | None:
    """None where no candidate on the primary pack names its criterion or was recovered."""
    pruned = [r for r in rows if not r.is_baseline and r.pack == gates.primary_pack and r.comparison]
    drawn = tuple(r for r in pruned if r.keep_n and (r.criterion or r.recovered))
    limits = {
        length: gates.ppl_limit(base.entries[gates.primary_pack, length]["model"]["ppl"])
        for length in gates.primary_seq_lens
        if any(row.seq_len == length for row in drawn)
    }
    return Curve(drawn, limits, experts_kept(base)) if limits else None


def _landscapes(base: Result, gates: Gates) -> tuple[Landscape, ...]:
    keys = [(gates.primary_pack, length) for length in gates.primary_seq_lens]
    return tuple(
        Landscape(f"{base.label}, {pack}, {length} tokens", length, base.entries[pack, length]["model"])
        for pack, length in keys
        if (pack, length) in base.entries
    )
