"""The page's charts before a choice is made: what plotly needs, without the values that its script puts in."""

import json

from . import charts
from .model import Report

# Viridis without its darkest third, in which a single token would not be seen on a dark page.
_COUNTS_ON_DARK = [[0, "#355f8d"], [0.25, "#21918c"], [0.6, "#5ec962"], [1, "#fde725"]]
# One token: a figure of every part that a real entry has.
_EDGES = [0.0, 1.0]
_ENTRY = {
    "hist2d_x_H": {"x_edges": _EDGES, "y_edges": _EDGES, "counts": [1], "xbins": 1, "ybins": 1},
    "hist1d_x": {"edges": _EDGES, "counts": [1]},
    "hist1d_H": {"edges": _EDGES, "counts": [1]},
    "quadrants": dict.fromkeys(charts.QUADRANTS, 0.25),
    "p_thr": 0.5,
    "h_thr": 0.5,
}


def page_figures(report: Report) -> dict:
    """By name, each as ``wide`` and ``narrow``; landscapes as ``log`` and ``plain`` above that. templates: light and dark."""
    pair = (_ENTRY, _ENTRY, ("left", "right"))
    found = {
        "landscapes": {
            name: {width: charts.landscapes(*pair, log=log, stacked=stacked) for width, stacked in _WIDTHS}
            for name, log in (("log", True), ("plain", False))
        },
        "distributions": {width: charts.distributions(*pair, stacked=stacked) for width, stacked in _WIDTHS},
    }
    if report.curve:
        found["keep_curve"] = {width: charts.keep_curve(report.curve, stacked=stacked) for width, stacked in _WIDTHS}
        found["quality"] = _quality(report)
    if report.saliencies:
        found["saliency"] = _both(charts.saliency(*_first_ranking(report), best_first=False))
    templates = {name: charts.template(dark=name == "dark") for name in ("light", "dark")}
    fixed = {"difference_unit": charts.DIFFERENCE_UNIT, "counts_on_dark": _COUNTS_ON_DARK}
    return _plain(found) | {"templates": _plain(templates)} | fixed


def curve_captions(report: Report) -> dict[str, str]:
    """Of the charts that show all candidates at once, by name."""
    if not report.curve:
        return {}
    return {
        "keep_curve": "Perplexity added, by experts kept, with 90 % intervals; shaded: within the gate",
        "quality": f"Perplexity added, by the size of the checkpoint, at {max(report.curve.limits):,} tokens",
    }


_WIDTHS = (("wide", False), ("narrow", True))


def _both(figure) -> dict:
    """The same for wide and narrow pages."""
    return {width: figure for width, _ in _WIDTHS}


def _quality(report: Report) -> dict:
    """On the primary pack, at the longest primary length that is there."""
    seq_len = max(report.curve.limits)
    rows = [r for r in report.rows if r.comparison and (r.pack, r.seq_len) == (report.gates.primary_pack, seq_len)]
    return _both(charts.quality_against_size(rows, report.bytes_total, report.curve.limits[seq_len]))


def _first_ranking(report: Report) -> tuple:
    import numpy as np

    first = report.saliencies[0]
    entry = {"scores": first.scores, "ranking": first.ranking}
    return {"criteria": {first.criterion: entry}}, first.criterion, np.array(first.ranking)[:, :1]


def _plain(value):
    """Figures as plotly writes them, in dicts that JSON knows."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return json.loads(value.to_json()) if hasattr(value, "to_json") else value.to_plotly_json()
