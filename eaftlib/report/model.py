"""What a report says, as one typed object; tables, page, notebook and terminal only render it."""

from dataclasses import dataclass

from ..errors import ResultError
from ..evaluation.compare import Comparison, Delta, compare
from ..evaluation.gates import PASS, Check, Gates, Verdict, dtypes_differ, judge
from ..evaluation.results import Result

SCHEMA = "eaft-verdict/1"


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

    recovered: None where nothing was trained.
    """

    label: str
    criterion: str | None
    keep_n: int | None
    num_experts: int | None
    recovered: Recovered | None
    status: str
    reasons: tuple[str, ...]
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class Row:
    """One model on one pack and sequence length; the baseline's own row has a comparison of zeros."""

    label: str
    criterion: str | None
    keep_n: int | None
    recovered: Recovered | None
    pack: str
    seq_len: int
    ppl: float
    cc_rate: float
    mean_prob: float
    mean_entropy: float
    kept_tokens: int
    comparison: Comparison
    gate: str  # status on a primary pack and length, "baseline", or nothing
    is_baseline: bool


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
    model: dict


@dataclass(frozen=True)
class Report:
    """Everything that is shown; ``best`` is the passing candidate with the fewest experts, if any passes."""

    gates: str
    primary_pack: str
    model_id: str
    baseline: str
    headline: str
    best: Candidate | None
    candidates: tuple[Candidate, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    curve: Curve | None
    landscapes: tuple[Landscape, ...]

    @property
    def tables(self) -> dict[tuple[str, int], list[Row]]:
        """Rows by pack and sequence length, in that order."""
        keys = sorted({(row.pack, row.seq_len) for row in self.rows})
        return {key: [row for row in self.rows if (row.pack, row.seq_len) == key] for key in keys}

    def content(self) -> dict:
        """The content of verdict.json."""
        return {
            "schema": SCHEMA,
            "gates": self.gates,
            "baseline": self.baseline,
            "headline": self.headline,
            "best": self.best.label if self.best else None,
            "models": {
                c.label: {
                    "verdict": c.status,
                    "keep_n": c.keep_n,
                    "criterion": c.criterion,
                    "recovered": vars(c.recovered) if c.recovered else None,
                    "reasons": list(c.reasons),
                    "checks": [vars(check) for check in c.checks],
                }
                for c in self.candidates
            },
        }


def build(results: list[Result], baseline: str, gates: Gates) -> Report:
    """Compare every result with the one labelled ``baseline``. Raises ResultError when it is not there or rows differ."""
    by_label = {r.label: r for r in results}
    if baseline not in by_label:
        raise ResultError(f"baseline: no result is labelled {baseline!r}; there are {sorted(by_label)}")
    base = by_label.pop(baseline)
    found = sorted(by_label.values(), key=lambda r: (-(experts_kept(r) or 0), r.label))
    verdicts = [judge(result, base, gates) for result in found]
    candidates = tuple(_candidate(r, base, v) for r, v in zip(found, verdicts, strict=True))
    rows = [_row(base, key, _with_itself(base, key), "baseline", is_baseline=True) for key in base.entries]
    for result, verdict in zip(found, verdicts, strict=True):
        rows += _rows(result, base, verdict, gates)
    best = _best(candidates, verdicts)
    return Report(
        gates=gates.name,
        primary_pack=gates.primary_pack,
        model_id=base.meta.get("model_id", ""),
        baseline=base.label,
        headline=_headline(candidates, best, by_label, base, gates),
        best=best,
        candidates=candidates,
        rows=tuple(rows),
        notes=_notes(found, base, gates, any(r.comparison.binned for r in rows if not r.is_baseline)),
        curve=_curve(rows, base, gates),
        landscapes=_landscapes(base, gates),
    )


def experts_kept(result: Result) -> int | None:
    """Experts per layer of the model that was scored; None where an earlier file does not say."""
    keep_set = result.meta.get("keep_set") or {}
    return keep_set.get("keep_n", result.meta.get("num_experts"))


def _criterion(result: Result) -> str | None:
    return (result.meta.get("keep_set") or {}).get("criterion")


def _recovered(result: Result) -> Recovered | None:
    found = result.meta.get("recovered")
    return Recovered(found["parameters_share"], found["tokens"]) if found else None


def _candidate(result: Result, base: Result, verdict: Verdict) -> Candidate:
    return Candidate(
        label=result.label,
        criterion=_criterion(result),
        keep_n=experts_kept(result),
        num_experts=experts_kept(base),
        recovered=_recovered(result),
        status=verdict.status,
        reasons=verdict.reasons,
        checks=verdict.checks,
    )


def _best(candidates: tuple[Candidate, ...], verdicts: list[Verdict]) -> Candidate | None:
    def experts_then_cost(pair: tuple[Candidate, Verdict]) -> tuple:
        candidate, verdict = pair
        kept = candidate.keep_n  # an earlier file does not say: it comes last
        return kept is None, kept or 0, max(c.ppl.value for c in verdict.comparisons.values())

    passing = [pair for pair in zip(candidates, verdicts, strict=True) if pair[1].status == PASS]
    return min(passing, key=experts_then_cost)[0] if passing else None


def _headline(
    candidates: tuple[Candidate, ...], best: Candidate | None, results: dict[str, Result], base: Result, gates: Gates
) -> str:
    """One sentence that answers the question."""
    if best is None:
        return f"None of {len(candidates)} candidates passes {gates.name}."
    before, after = base.meta.get("bytes_total"), results[best.label].meta.get("bytes_total")
    trained, saved = "", f", {1 - after / before:.1%} of the bytes gone" if before and after else ""
    if best.recovered:
        trained = ", every kept expert matrix as it was, "
        trained += f"{best.recovered.trained} of the parameters trained on {best.recovered.trained_on}"
        saved = saved.replace(", ", "; ")
    passing = sum(c.status == PASS for c in candidates)
    return (
        f"{best.label} passes {gates.name} with {best.keep_n or '?'} of {best.num_experts or '?'} experts "
        f"per layer{trained}{saved}; {passing} of {len(candidates)} candidates pass."
    )


def _rows(result: Result, base: Result, verdict: Verdict, gates: Gates) -> list[Row]:
    """A candidate's rows, wherever the baseline was scored too."""
    rows = []
    for pack, seq_len in result.entries:
        if (pack, seq_len) not in base.entries:
            continue
        judged = pack == gates.primary_pack and seq_len in verdict.comparisons
        comparison = verdict.comparisons[seq_len] if judged else compare(result, base, pack, seq_len)
        rows.append(_row(result, (pack, seq_len), comparison, verdict.status_at(seq_len) if judged else ""))
    return rows


def _row(result: Result, key: tuple[str, int], comparison: Comparison, gate: str, is_baseline: bool = False) -> Row:
    model = result.entries[key]["model"]
    return Row(
        label=result.label,
        criterion=_criterion(result),
        keep_n=experts_kept(result),
        recovered=_recovered(result),
        pack=key[0],
        seq_len=key[1],
        **{name: model[name] for name in ("ppl", "cc_rate", "mean_prob", "mean_entropy", "kept_tokens")},
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
        js2d=0.0,
        js2d_floor=None,
        cc_rate_at_base=base.entries[key]["model"]["cc_rate"],
        binned=base.binned,
        kl_to_base=None,
        top1_agreement=None,
    )


def _notes(candidates: list[Result], base: Result, gates: Gates, binned: bool) -> tuple[str, ...]:
    """How to read the tables, with the facts of this report filled in."""
    meta, limits = base.meta, gates.limits
    lengths = " and ".join(map(str, gates.primary_seq_lens))
    notes = [
        f"Gates ({gates.name}): {gates.primary_pack} at {lengths} tokens, all must pass: |dPPL| <= "
        f"min({limits['ppl_absolute']}, {limits['ppl_relative']:.0%} of the baseline's PPL), |dCC| <= {limits['cc_rate']}, "
        f"|d mean p| <= {limits['mean_prob']}, JS2D <= {limits['js2d']}.",
        "CC rate: confident conflicts, tokens with p and H both under the baseline's thresholds.",
        "Intervals: 95 %, paired bootstrap over blocks.",
        "JS2D: divergence of the (p, H) histograms. Its floor is what chance gives: the two models' values swapped at "
        "random, token by token. A value above the limit by no more than the floor decides nothing (UNDECIDED).",
        "trained: share of the whole model's parameters that training changed afterwards, to give the whole model's "
        "next-token distributions again; the expert matrices are not among them. '-': nothing was trained.",
        "KL and top-1: mean KL(baseline, candidate) over the full vocabulary, and share of equal arg-max, where both "
        "models ran in one pass.",
        f"Evaluated rows: {meta.get('rows', 'unknown')}; {_blocks(meta.get('num_blocks', '?'))}; "
        f"{meta.get('gpu_name') or meta.get('device', 'device unknown')}, {meta.get('dtype', 'dtype unknown')}.",
    ]
    rounded = [f"{c.label} in {c.meta['dtype']}" for c in candidates if dtypes_differ(c, base)]
    if rounded:
        notes.append(
            f"Precision: the baseline was scored in {meta['dtype']}, {', '.join(rounded)}. Part of their difference is "
            "rounding, not pruning."
        )
    if binned:
        notes.append(
            "(binned): per-token values were not at hand; conflicts and floors come from histogram bins. Files without schema "
            "do not record rows or tokenizer, so that those agree is not checked."
        )
    return tuple(notes)


def _blocks(num_blocks: int | str | dict[str, int]) -> str:
    if isinstance(num_blocks, dict):
        return ", ".join(f"{count} blocks of {length} tokens" for length, count in num_blocks.items())
    return f"{num_blocks} blocks per sequence length"


def _curve(rows: list[Row], base: Result, gates: Gates) -> Curve | None:
    """None where no candidate on the primary pack names its criterion or was recovered."""
    pruned = [r for r in rows if not r.is_baseline and r.pack == gates.primary_pack]
    drawn = tuple(r for r in pruned if r.criterion or (r.recovered and r.keep_n))
    limits = {
        length: gates.ppl_limit(base.entries[gates.primary_pack, length]["model"]["ppl"])
        for length in gates.primary_seq_lens
        if any(row.seq_len == length for row in drawn)
    }
    return Curve(drawn, limits, experts_kept(base)) if limits else None


def _landscapes(base: Result, gates: Gates) -> tuple[Landscape, ...]:
    keys = [(gates.primary_pack, length) for length in gates.primary_seq_lens]
    return tuple(
        Landscape(f"{base.label}, {pack}, {length} tokens", base.entries[pack, length]["model"])
        for pack, length in keys
        if (pack, length) in base.entries
    )
