"""What the page's script reads: every model's numbers and histograms by pack and length, as JSON and compact."""

import base64
import gzip
from collections.abc import Iterable

import numpy as np

from ..evaluation.compare import Comparison, Delta
from .candidates import Candidate
from .model import Report, Row
from .saliency import Saliency

SCHEMA = "eaft-page/1"


def page_data(report: Report) -> dict:
    """Another serialisation of the report than ``Report.content``: for comparing any two of its models."""
    labels = [report.baseline, *(c.label for group in report.groups for c in group.candidates)]
    candidates = {c.label: c for c in report.candidates}
    shown = report.best or report.nearest
    return {
        "schema": SCHEMA,
        "gates": {
            "name": report.gates.name,
            "primary_pack": report.gates.primary_pack,
            "primary_seq_lens": list(report.gates.primary_seq_lens),
            "limits": report.gates.limits,
        },
        "baseline": report.baseline,
        "shown": shown.label if shown else None,
        "models": [_model(label, candidates.get(label), report) for label in labels],
        "saliencies": [_saliency(found) for found in report.saliencies],
        "rows": [_row(row) for row in sorted(report.rows, key=lambda r: labels.index(r.label))],
    }


def _model(label: str, candidate: Candidate | None, report: Report) -> dict:
    found = {"label": label, "bytes": report.bytes_total.get(label), "method": None, "keep_n": None}
    if candidate is None:
        return found | {
            "method": "baseline",
            "keep_n": report.num_experts,
            "trained": None,
            "verdict": None,
            "evidence": None,
        }
    return found | {
        "method": candidate.method,
        "keep_n": candidate.keep_n,
        "trained": candidate.recovered and candidate.recovered.trained,
        "verdict": candidate.status,
        "evidence": candidate.evidence,
    }


def _row(row: Row) -> dict:
    entry = row.entry
    hist = entry["hist2d_x_H"]
    return {
        "model": row.label,
        "pack": row.pack,
        "seq_len": row.seq_len,
        "input": row.input and row.input[:16],
        "binned": row.binned,
        "gate": row.gate,
        "tokens": entry["kept_tokens"],
        "ppl": entry["ppl"],
        "mean_nll": entry["mean_nll"],
        "mean_prob": entry["mean_prob"],
        "mean_entropy": entry["mean_entropy"],
        "p_thr": entry["p_thr"],
        "h_thr": entry["h_thr"],
        "cc_rate": entry["cc_rate"],
        "quadrants": entry.get("quadrants"),
        "tok_s": entry.get("tok_s_pred"),
        "comparison": _comparison(row.comparison) if row.comparison and not row.is_baseline else None,
        "cc_rate_at_base": row.comparison.cc_rate_at_base if row.comparison else None,
        "bins": [hist["xbins"], hist["ybins"]],
        "hist": pack_counts(hist["counts"]),
    }


def _comparison(found: Comparison) -> dict:
    return {
        "ppl": _delta(found.ppl),
        "cc": _delta(found.cc),
        "mean_prob": _delta(found.mean_prob),
        "js2d": {
            "value": found.js2d.value,
            "estimate": found.js2d.estimate,
            "interval": found.js2d.interval,
            "floor": found.js2d.floor,
        },
        "kl": found.kl_to_base,
        "top1": found.top1_agreement,
        "sample": found.sample and {"unit": found.sample.unit, "count": found.sample.count},
    }


def _saliency(found: Saliency) -> dict:
    return {
        "title": f"{found.criterion}, {found.source}",
        "criterion": found.criterion,
        "scores": [[None if x is None else float(f"{x:.5g}") for x in layer] for layer in found.scores],
        "ranking": found.ranking,
        "keep_sets": {str(count): ids for count, ids in found.keep_sets.items()},
    }


def _delta(delta: Delta) -> dict:
    return {"value": delta.value, "interval": delta.interval}


def pack_counts(counts: Iterable[int]) -> str:
    """Cell counts in base64 of gzip of pairs of varints: cells since the last occupied one, count.

    A varint is seven bits a byte, low ones first, the eighth set where more follow. A histogram of 19,200 cells takes some
    kilobytes.
    """
    counts = np.asarray(counts, np.int64)
    cells = np.flatnonzero(counts)
    pairs = np.stack([np.diff(cells, prepend=-1), counts[cells]], axis=1)
    packed = gzip.compress(_varints(pairs.ravel()), compresslevel=9, mtime=0)
    return base64.b64encode(packed).decode()


def _varints(values: np.ndarray) -> bytes:
    """Of int64 [N], none negative."""
    digits = [values >> shift for shift in range(0, 63, 7)]
    used = np.stack([digit > 0 for digit in digits], axis=1)
    used[:, 0] = True
    low = np.stack([digit & 127 for digit in digits], axis=1)
    more = np.concatenate([used[:, 1:], np.zeros((len(values), 1), bool)], axis=1)
    return (low | more << 7)[used].astype(np.uint8).tobytes()
