"""Interactive charts: pure functions from results and rankings to Plotly figures, the same in the page and in notebooks.

The same input gives the same JSON. Backgrounds are transparent and texts take their colour from the template, so that a figure
stands on light and on dark pages: ``figure.update_layout(template=template(dark=True))``. Names come from files: they are
escaped, because Plotly reads tags in texts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..pruning.explore import overlap
from . import colors

if TYPE_CHECKING:
    from ..pruning.explore import Choice
    from .model import Candidate, Curve, Row

HEIGHT = 380  # pixels of a panel with its axis titles
DIFFERENCE_UNIT = 1e-5  # share of tokens up to which the scale of a landscape's difference is linear
QUADRANTS = {"LL": (0, 0), "LH": (0, 1), "HL": (1, 0), "HH": (1, 1)}  # low or high p, then H: corners of a panel

_CLEAR = "rgba(0,0,0,0)"
_BAND = "rgba(0,158,115,0.15)"  # GOOD, for areas
# From one model's colour through its lighter kin over nothing to the other's: no difference looks like the page.
_DIVERGING = [
    [0, colors.LEFT], [0.25, "rgba(86,180,233,0.85)"], [0.5, "rgba(128,128,128,0)"], [0.75, "rgba(230,159,0,0.85)"],
    [1, colors.RIGHT],
]  # fmt: skip


def template(dark: bool) -> go.layout.Template:
    """Colours of texts, axes and grids for a dark or a light page."""
    text, grid, line = ("#e8eaed", "#3c4248", "#8a929a") if dark else ("#1c2529", "#e3e6e8", "#8a929a")
    axis = {"gridcolor": grid, "linecolor": line, "zerolinecolor": line, "tickcolor": line, "automargin": True}
    return go.layout.Template(
        layout={
            "font": {"color": text, "family": "system-ui, sans-serif", "size": 13},
            "title": {"font": {"size": 15}, "x": 0},
            "xaxis": axis,
            "yaxis": axis,
            "hoverlabel": {"bgcolor": "#22282d" if dark else "#ffffff", "font": {"color": text}, "align": "left"},
            "legend": {"bgcolor": _CLEAR},
            "annotationdefaults": {"font": {"size": 12}},
        }
    )


@dataclass(frozen=True)
class Scale:
    """An axis that is linear up to about ``unit`` on both sides of zero and logarithmic beyond, which Plotly has not.

    Values are drawn at asinh(value / unit), and ticks are labelled with values.
    """

    unit: float

    def __call__(self, values: Iterable[float | None]) -> np.ndarray:
        """float64; NaN for None."""
        return np.arcsinh(np.array([np.nan if v is None else v for v in values], float) / self.unit)

    def axis(self, low: float, high: float, ticks: int = 9) -> dict:
        """An axis' range and ticks from ``low`` to ``high`` (values): zero, then decades, their halves and fifths that fit."""
        start, end = self([low, high])
        apart = (end - start) / ticks
        decades = range(math.floor(math.log10(self.unit)) - 1, math.ceil(math.log10(max(abs(low), abs(high)))) + 1)
        rounds = [sign * step * 10.0**decade for step in (1, 5, 2) for decade in decades for sign in (1, -1)]
        chosen = [0.0]
        for value in rounds:
            inside = low <= value <= high
            if inside and all(abs(self([value])[0] - self([other])[0]) >= apart for other in chosen):
                chosen.append(value)
        chosen.sort()
        return {"range": [start, end], "tickvals": self(chosen), "ticktext": [f"{value:g}" for value in chosen]}


def landscapes(left: dict, right: dict, titles: tuple[str, str], log: bool = True, stacked: bool = False) -> go.Figure:
    """(p, H) histograms of two result entries (their ``model``) and right minus left in shares of tokens.

    Traces: left, right (z: log10 of counts with ``log``, else counts; customdata: counts), difference (z: asinh of the share
    / DIFFERENCE_UNIT with ``log``, else the share; customdata: percentage points). Empty cells are NaN. Shapes: each model's
    p_thr and h_thr, in its own panel and, the right one's dashed, in the third. Annotations after the titles: each
    model's quadrants in the order of QUADRANTS, where its entry has them. stacked: one above the other, for narrow pages.
    """
    counts = [_counts(model) for model in (left, right)]
    shares = [c / c.sum() for c in counts]
    difference = shares[1] - shares[0]
    empty = counts[0] + counts[1] == 0
    names = [*map(escape, titles), f"{escape(titles[1])} minus {escape(titles[0])}"]
    figure = _panels(names, stacked, shared_xaxes="all", shared_yaxes="all", vertical_spacing=0.09)
    x, y = (_centres(left["hist2d_x_H"][edges]) for edges in ("x_edges", "y_edges"))
    for panel, part in enumerate(counts):
        z = _log10(part) if log else np.where(part > 0, part, np.nan)
        _heat(figure, panel, stacked, x, y, z, part, "coloraxis", "%{customdata:,} tokens")
    z = np.where(empty, np.nan, np.arcsinh(difference / DIFFERENCE_UNIT) if log else difference)
    _heat(figure, 2, stacked, x, y, z, 100 * difference, "coloraxis2", "%{customdata:+.4f} percentage points")
    _thresholds(figure, left, right, stacked)
    _quadrants(figure, (left, right), stacked)
    figure.update_xaxes(range=[0, 1], showgrid=False, zeroline=False)
    figure.update_yaxes(range=[0, 1], showgrid=False, zeroline=False)
    _titles(figure, "p, probability of the token that came", "H, top-K entropy", stacked)
    largest = max(1, *(int(part.max()) for part in counts))
    return figure.update_layout(
        coloraxis=_count_colors(largest, log, stacked),
        coloraxis2=_difference_colors(float(np.nanmax(np.abs(z), initial=0)) or 1.0, log, stacked),
        height=HEIGHT * 3 if stacked else HEIGHT + 60,
        margin={"b": 130},
    )


def distributions(left: dict, right: dict, names: tuple[str, str], stacked: bool = False) -> go.Figure:
    """Histograms of p and of H of two result entries (their ``model``), overlaid, as shares of tokens on a log axis.

    Traces: p of left, p of right, H of left, H of right; customdata: counts. Bins without a token are gaps.
    """
    figure = _panels(["p, probability of the token that came", "H, top-K entropy"], stacked, shared_yaxes=True)
    for panel, (histogram, axis) in enumerate((("hist1d_x", 1), ("hist1d_H", 0))):
        for model, name, color in zip((left, right), names, (colors.LEFT, colors.RIGHT), strict=True):
            edges, counts = _histogram(model, histogram, axis)
            bars = go.Bar(
                x=_centres(edges),
                y=np.where(counts > 0, counts / counts.sum(), np.nan),
                width=np.diff(edges),
                customdata=counts,
                name=escape(name),
                legendgroup=escape(name),
                showlegend=panel == 0,
                marker={"color": color, "opacity": 0.55, "line": {"width": 0}},
                hovertemplate="%{x:.4f}: %{y:.3%} of tokens (%{customdata:,})",
            )
            figure.add_trace(bars, *_place(panel, stacked))
    figure.update_xaxes(range=[0, 1], showgrid=False)
    figure.update_yaxes(type="log", tickformat="~%", title_text="share of tokens, log", exponentformat="none")
    figure.update_yaxes(title_text="", selector=-1) if not stacked else None
    return figure.update_layout(
        barmode="overlay",
        bargap=0,
        hovermode="x unified",
        height=HEIGHT * 2 if stacked else HEIGHT,
        legend={"orientation": "h", "y": 1.18, "x": 0},
        margin={"t": 80},
    )


def keep_curve(curve: Curve, stacked: bool = False) -> go.Figure:
    """dPPL over experts kept with 90 % intervals, a panel per sequence length, the gate as a band; on a Scale.

    The scale's unit is the smallest gate, so that inside of it the axis is about linear. A line per criterion that ends at
    the whole model's zero; recovered models are stars, which no line joins. customdata: label, dPPL, both ends.
    """
    scale = Scale(min(curve.limits.values()))
    figure = _panels([f"{length} tokens" for length in curve.limits], stacked, shared_yaxes=True, vertical_spacing=0.14)
    known: set[str] = set()
    for panel, (seq_len, limit) in enumerate(curve.limits.items()):
        part = [r for r in curve.rows if r.seq_len == seq_len]
        for trace in _curve_traces(part, curve.num_experts, scale):
            figure.add_trace(trace.update(showlegend=trace.name not in known), *_place(panel, stacked))
            known.add(trace.name)
        _gate_band(figure, panel, stacked, limit, scale)
        kept = sorted({r.keep_n for r in part} | {curve.num_experts})
        row, col = _place(panel, stacked)
        figure.update_xaxes(tickvals=kept, range=[kept[0] - 1, kept[-1] + 1], row=row, col=col)
    figure.update_yaxes(**_cost_axis(curve.rows, max(curve.limits.values()), scale))
    _titles(figure, f"experts kept of {curve.num_experts}", "dPPL, asinh scale", stacked)
    return figure.update_layout(
        height=HEIGHT * len(curve.limits) if stacked else HEIGHT + 40,
        legend={"orientation": "h", "y": -0.22 if not stacked else -0.1},
    )


def quality_against_size(rows: Sequence[Row], bytes_of: Mapping[str, int], limit: float) -> go.Figure:
    """dPPL with 90 % intervals against the checkpoint's size, a point per model, on a Scale with the gate as its unit.

    rows: of one pack and sequence length, the baseline's among them, which is a black and white diamond at zero. bytes_of: by
    label; models that it lacks are left out. limit: of the dPPL gate. customdata: label, dPPL, both ends, experts kept.
    """
    scale, known = Scale(limit), [r for r in rows if r.label in bytes_of]
    unit, factor = ("GB", 1e9) if max(bytes_of.values(), default=0) >= 1e9 else ("MB", 1e6)
    figure = _panels([""], False)
    groups: dict[str, list[Row]] = {}
    for row in sorted(known, key=lambda r: bytes_of[r.label]):
        groups.setdefault(_series(row), []).append(row)
    for name, members in sorted(groups.items()):
        trace = _points(members, [bytes_of[r.label] / factor for r in members], name, scale)
        trace.hovertemplate = f"%{{customdata[0]}}<br>%{{x:,.3f}} {unit}, %{{customdata[4]}} experts kept<br>{_COST}"
        figure.add_trace(trace)
    _gate_band(figure, 0, False, limit, scale)
    figure.update_yaxes(**_cost_axis(known, limit, scale))
    _titles(figure, f"checkpoint, {unit}", "dPPL, asinh scale", False)
    return figure.update_layout(height=HEIGHT + 40, legend={"orientation": "h", "y": -0.22})


def saliency(
    ranking: dict, criterion: str, kept: np.ndarray | None = None, best_first: bool = True, title: str = ""
) -> go.Figure:
    """Heat map of a criterion's scores [L, E] as shares of their layer, log colours, kept experts marked.

    ranking: the content of ranking.json. kept: ids [L, n]. best_first: each layer's experts in its ranking's order, else by
    id. Shares are of the positive scores of a layer; negative ones and experts that no token met are empty cells.
    customdata: expert id, score.
    """
    entry = ranking["criteria"][criterion]
    scores, order = np.array(entry["scores"], float), np.array(entry["ranking"])
    figure = _panels([title], False)
    for trace in saliency_traces(scores, order if best_first else None, criterion, kept):
        figure.add_trace(trace)
    return figure.update_layout(height=saliency_height(len(scores)), **saliency_layout(scores.shape, best_first))


def keep_set(choice: Choice, criterion: str, other: Choice, other_criterion: str) -> go.Figure:
    """A keep-set in its criterion's saliency map, and by layer: experts in common with another, mass kept, predicted loss.

    Traces: heat map and marks (see saliency), then bars of experts in common, share of sum g n kept, predicted loss; the
    other's mass and loss as ticks beside them. Titles have means over layers. Without Gram matrices the last panel says so.
    """
    figure = make_subplots(
        2, 3, specs=[[{"colspan": 3}, None, None], [{}, {}, {}]], vertical_spacing=0.2, horizontal_spacing=0.06,
        row_heights=[0.58, 0.42], subplot_titles=keep_set_titles(choice, criterion, other, other_criterion),
    )  # fmt: skip
    scores, order = np.array(choice.entry["scores"], float), np.array(choice.entry["ranking"])
    for trace in saliency_traces(scores, order, criterion, choice.kept):
        figure.add_trace(trace, 1, 1)
    common = overlap(choice.kept, other.kept)
    layer, name, other_name = np.arange(len(common)), escape(criterion), escape(other_criterion)
    figure.add_trace(_layer_bars(layer, common, name, "%{y} experts in common"), 2, 1)
    for col, ours, theirs, form in ((2, choice.mass, other.mass, ".2%"), (3, choice.loss, other.loss, ".4f")):
        if ours is not None:
            figure.add_trace(_layer_bars(layer, ours, name, f"{name} %{{y:{form}}}"), 2, col)
            figure.add_trace(
                _layer_ticks(layer, theirs, other_criterion, f"{other_name} %{{y:{form}}}", col == 2), 2, col
            )
    figure.update_layout(**saliency_layout(scores.shape, True))
    figure.update_xaxes(title_text="layer", dtick=1 if len(layer) <= 12 else 4, showgrid=False, row=2)
    figure.update_yaxes(rangemode="tozero", row=2)
    figure.update_yaxes(range=[0, choice.kept.shape[1]], row=2, col=1)
    figure.update_yaxes(range=[0, 1], tickformat=".0%", row=2, col=2)
    figure.update_layout(coloraxis={"colorbar": {"y": 1, "yanchor": "top", "len": 0.5}}, barmode="overlay")
    return figure.update_layout(height=saliency_height(len(scores)) + HEIGHT - 60, **_BLANK)


def keep_set_titles(choice: Choice, criterion: str, other: Choice, other_criterion: str) -> list[str]:
    """Of the map and the three panels under it."""
    keep_n, experts = choice.kept.shape[1], len(choice.entry["ranking"][0])
    share = overlap(choice.kept, other.kept).mean() / keep_n
    if choice.loss is None:
        loss = "no predicted loss: rank with recon among the criteria"
    else:
        loss = f"predicted loss, share of output: {choice.loss.mean():.4f}"
    return [
        f"{escape(criterion)} keeps {keep_n} of {experts}",
        f"in common with {escape(other_criterion)}: {share:.1%}",
        f"mass (sum of g n) kept: {choice.mass.mean():.1%}",
        loss,
    ]


def _layer_bars(layer: np.ndarray, values: np.ndarray, criterion: str, text: str) -> go.Bar:
    style = colors.of_criterion(criterion)
    return go.Bar(
        x=layer,
        y=values,
        marker={"color": style.color, "opacity": 0.75},
        name=criterion,
        showlegend=False,
        hovertemplate=f"layer %{{x}}: {text}<extra></extra>",
    )


def _layer_ticks(layer: np.ndarray, values: np.ndarray, criterion: str, text: str, in_legend: bool) -> go.Scatter:
    """Another keep-set's values as ticks over the bars."""
    line = {"width": 2.5, "color": colors.of_criterion(criterion).color}
    return go.Scatter(
        x=layer,
        y=values,
        mode="markers",
        marker={"symbol": "line-ew-open", "size": 13, "line": line, "color": line["color"]},
        name=escape(criterion),
        showlegend=in_legend,
        hovertemplate=f"layer %{{x}}: {text}<extra></extra>",
    )


def saliency_traces(
    scores: np.ndarray, order: np.ndarray | None, criterion: str, kept: np.ndarray | None
) -> list[go.Heatmap | go.Scatter]:
    """The heat map and the marks. order: ids [L, E] from left to right; None: by id."""
    layers, experts = scores.shape
    ids = np.broadcast_to(np.arange(experts), scores.shape) if order is None else order
    share = np.take_along_axis(layer_shares(scores), ids, axis=1)
    heat = go.Heatmap(
        z=_log10(share),
        x=np.arange(experts),
        y=np.arange(layers),
        customdata=np.dstack([ids, np.take_along_axis(scores, ids, axis=1)]),
        coloraxis="coloraxis",
        name="",
        hovertemplate=f"layer %{{y}}, expert %{{customdata[0]}}<br>{escape(criterion)} %{{customdata[1]:.5g}}",
        xgap=1,
        ygap=1,
    )
    if kept is None:
        return [heat]
    stays = np.zeros(scores.shape, bool)
    np.put_along_axis(stays, kept, True, axis=1)
    layer, place = np.nonzero(np.take_along_axis(stays, ids, axis=1))
    marks = go.Scatter(
        x=place,
        y=layer,
        mode="markers",
        marker={"size": 6, "color": "#ffffff", "line": {"color": "#000000", "width": 1}},
        name=f"kept, {kept.shape[1]} a layer",
        hoverinfo="skip",
        showlegend=True,
    )
    return [heat, marks]


def saliency_layout(shape: tuple[int, int], best_first: bool) -> dict:
    """Axes and colours of saliency_traces for scores [L, E]."""
    layers, experts = shape
    ticks = np.arange(-4, 1)
    return {
        "xaxis": {
            "title": {"text": "experts, best first" if best_first else "expert id"},
            "range": [-0.5, experts - 0.5],
            "showgrid": False,
            "zeroline": False,
        },
        "yaxis": {
            "title": {"text": "layer"},
            "range": [layers - 0.5, -0.5],
            "showgrid": False,
            "zeroline": False,
            "dtick": 1 if layers <= 12 else 4,
        },
        "coloraxis": {
            "colorscale": "Viridis",
            "colorbar": {
                "title": {"text": "share of<br>its layer"},
                "tickvals": ticks,
                "ticktext": [f"{100 * 10.0**t:g} %" for t in ticks],
            },
        },
        "legend": {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
    }


def saliency_height(layers: int) -> int:
    return 150 + 20 * max(8, layers)


def layer_shares(scores: np.ndarray) -> np.ndarray:
    """Scores [L, E] as shares of their layer's positive ones; NaN for scores that are negative or missing."""
    positive = np.where(scores > 0, scores, np.nan)
    total = np.nansum(positive, axis=1, keepdims=True)
    return np.divide(positive, total, out=np.full(scores.shape, np.nan), where=total > 0)


def gates(candidate: Candidate) -> go.Figure:
    """A candidate's gates as bars in units of their limits, on a Scale, 90 % intervals beside them; within the band is a pass.

    customdata: value, limit, both ends of the interval, v1's status, evidence.
    """
    checks, scale = candidate.checks, Scale(1.0)
    names = [f"{c.gate}, {c.seq_len}" for c in checks]
    ends = [tuple(end / c.limit for end in c.interval) if c.interval else (None, None) for c in checks]
    values = [c.value / c.limit for c in checks]
    figure = _panels([escape(candidate.label)], False)
    facts = [[c.value, c.limit, *(c.interval or ("", "")), c.status, c.evidence or "no interval"] for c in checks]
    bars = go.Bar(
        x=scale(values),
        y=names,
        orientation="h",
        marker={"color": [colors.GOOD if c.status == "PASS" else colors.BAD for c in checks], "opacity": 0.75},
        customdata=facts,
        hovertemplate="%{y} tokens: %{customdata[0]:+.5g}, limit %{customdata[1]:.5g}<br>"
        "90 % [%{customdata[2]:+.5g}, %{customdata[3]:+.5g}]<br>%{customdata[4]}, %{customdata[5]}<extra></extra>",
        width=0.55,
        showlegend=False,
    )
    figure.add_trace(bars)
    figure.add_trace(_interval_lines(names, ends, scale))
    figure.add_vrect(*scale([-1, 1]), fillcolor=_BAND, line={"width": 1.5, "color": colors.GOOD}, layer="below")
    reach = [abs(x) for x in [*values, *(end for pair in ends for end in pair)] if x is not None]
    furthest = 1.15 * max([1.5, *reach])
    lowest = -furthest if min([0.0, *values, *(low for low, _ in ends if low is not None)]) < 0 else -1.5
    figure.update_xaxes(**scale.axis(lowest, furthest), title_text="difference, in limits (asinh scale)")
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure.update_layout(height=130 + 38 * len(checks))


def _interval_lines(names: list[str], ends: list[tuple], scale: Scale) -> go.Scatter:
    """One trace of separate lines, a gap after each; an interval need not hold its bar's value (JS2D's is the estimate's)."""
    drawn = [(name, *pair) for name, pair in zip(names, ends, strict=True) if pair[0] is not None]
    return go.Scatter(
        x=scale([x for _, low, high in drawn for x in (low, high, None)]),
        y=[y for name, *_ in drawn for y in (name, name, None)],
        mode="lines+markers",
        line={"color": colors.GREY, "width": 2.5},
        marker={"symbol": "line-ns-open", "size": 11, "line": {"width": 2.5}},
        name="90 % interval",
        hoverinfo="skip",
    )


_COST = "dPPL %{customdata[1]:+.4f}, 90 % [%{customdata[2]:+.4f}, %{customdata[3]:+.4f}]<extra></extra>"


def _series(row: Row) -> str:
    """What a row is drawn as."""
    if row.is_baseline:
        return "baseline"
    return "recovered" if row.recovered else escape(row.criterion or "criterion unknown")


def _curve_traces(rows: list[Row], num_experts: int, scale: Scale) -> list[go.Scatter]:
    untrained = [r for r in rows if not r.recovered]
    traces = []
    for criterion in sorted({r.criterion for r in untrained}):
        line = sorted((r for r in untrained if r.criterion == criterion), key=lambda r: r.keep_n)
        trace = _points(line, [r.keep_n for r in line], escape(criterion), scale)
        style = colors.of_criterion(criterion)
        trace.update(mode="lines+markers", line={"color": style.color, "dash": style.dash, "width": 2})
        trace.x, trace.y = [*trace.x, num_experts], np.append(trace.y, 0.0)
        trace.customdata = [*trace.customdata, ["the whole model", 0.0, "", "", num_experts]]
        traces.append(trace)
    if stars := sorted((r for r in rows if r.recovered), key=lambda r: (r.keep_n, r.label)):
        traces.append(_points(stars, [r.keep_n for r in stars], "recovered", scale))
    return traces


def _points(rows: Sequence[Row], x: list[float], name: str, scale: Scale) -> go.Scatter:
    """Rows of one series with their intervals."""
    values = [r.comparison.ppl.value for r in rows]
    ends = [r.comparison.ppl.interval or (None, None) for r in rows]
    y, low, high = scale(values), scale([e[0] for e in ends]), scale([e[1] for e in ends])
    marker, color = _marker(rows[0])
    return go.Scatter(
        x=x,
        y=y,
        mode="markers",
        name=name,
        legendgroup=name,
        marker=marker,
        error_y={
            "type": "data", "symmetric": False, "array": high - y, "arrayminus": y - low, "color": color,
            "thickness": 1.5, "width": 3,
        },
        customdata=[
            [escape(r.label), v, *("" if e is None else e for e in pair), r.keep_n]
            for r, v, pair in zip(rows, values, ends, strict=True)
        ],
        hovertemplate="%{customdata[0]}<br>%{x} experts kept<br>" + _COST,
    )  # fmt: skip


def _marker(row: Row) -> tuple[dict, str]:
    """A series' marker and the colour of its intervals."""
    edge = {"color": "#000000", "width": 1}
    if row.is_baseline:
        return {"symbol": "diamond-x", "size": 12, "color": "#ffffff", "line": edge}, colors.GREY
    if row.recovered:
        return {"symbol": "star", "size": 15, "color": colors.RECOVERED, "line": edge}, colors.GREY
    style = colors.of_criterion(row.criterion)
    return {"symbol": style.symbol, "size": 8, "color": style.color}, style.color


def _gate_band(figure: go.Figure, panel: int, stacked: bool, limit: float, scale: Scale) -> None:
    row, col = _place(panel, stacked)
    low, high = scale([-limit, limit])
    line = {"color": colors.GOOD, "width": 1}
    figure.add_hrect(low, high, fillcolor=_BAND, line=line, layer="below", row=row, col=col)
    figure.add_annotation(
        text=f"gate ±{limit:.3f}", x=0.01, xref="x domain", y=high, xanchor="left", yanchor="bottom", showarrow=False,
        row=row, col=col,
    )  # fmt: skip


def _cost_axis(rows: Iterable[Row], limit: float, scale: Scale) -> dict:
    """Range and ticks that hold the gate, every value and every interval."""
    shown = [r.comparison.ppl for r in rows]
    values = [v for delta in shown for v in (delta.value, *(delta.interval or ()))]
    return scale.axis(1.2 * min(-limit, *values), 1.3 * max(limit, *values))


def _counts(model: dict) -> np.ndarray:
    """int32 [ybins, xbins]: H upwards, p to the right."""
    histogram = model["hist2d_x_H"]
    return np.array(histogram["counts"], np.int32).reshape(histogram["xbins"], histogram["ybins"]).T


def _histogram(model: dict, name: str, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """(edges, counts) of p (axis 1 of _counts) or H (axis 0); earlier files have only the two-dimensional histogram."""
    if name in model:
        return np.array(model[name]["edges"]), np.array(model[name]["counts"], np.int64)
    edges = model["hist2d_x_H"]["x_edges" if axis else "y_edges"]
    return np.array(edges), _counts(model).sum(1 - axis, dtype=np.int64)


def _centres(edges: Sequence[float]) -> np.ndarray:
    edges = np.asarray(edges, float)
    return (edges[:-1] + edges[1:]) / 2


def _log10(values: np.ndarray) -> np.ndarray:
    """NaN where there is nothing."""
    positive = values > 0
    return np.log10(values, out=np.full(values.shape, np.nan), where=positive)


_BLANK = {
    "template": template(dark=False), "paper_bgcolor": _CLEAR, "plot_bgcolor": _CLEAR,
    "margin": {"l": 60, "r": 20, "t": 50, "b": 60},
}  # fmt: skip


def _panels(titles: list[str], stacked: bool, **options) -> go.Figure:
    rows, cols = (len(titles), 1) if stacked else (1, len(titles))
    if not stacked:
        options.pop("vertical_spacing", None)
        options["horizontal_spacing"] = 0.05
    figure = make_subplots(rows, cols, subplot_titles=titles, **options)
    return figure.update_layout(**_BLANK)


def _place(panel: int, stacked: bool) -> tuple[int, int]:
    return (panel + 1, 1) if stacked else (1, panel + 1)


def _titles(figure: go.Figure, x: str, y: str, stacked: bool) -> None:
    """Axis titles, once where panels share an axis."""
    figure.update_xaxes(title_text=x, **({"row": len(figure._grid_ref)} if stacked else {}))
    figure.update_yaxes(title_text=y, **({} if stacked else {"col": 1}))


def _heat(figure, panel, stacked, x, y, z, facts, colors_of: str, unit: str) -> None:
    heat = go.Heatmap(
        x=x,
        y=y,
        z=z.astype(np.float32),
        customdata=facts if facts.dtype == np.int32 else facts.astype(np.float32),
        coloraxis=colors_of,
        name="",
        hovertemplate=f"p %{{x:.3f}}, H %{{y:.3f}}<br>{unit}",
    )
    figure.add_trace(heat, *_place(panel, stacked))


def _thresholds(figure: go.Figure, left: dict, right: dict, stacked: bool) -> None:
    for panel, model, dash in ((0, left, "solid"), (1, right, "solid"), (2, left, "solid"), (2, right, "dash")):
        row, col = _place(panel, stacked)
        line = {"color": colors.VERMILLION if panel < 2 else colors.GREY, "width": 1.5, "dash": dash}
        figure.add_vline(model["p_thr"], line=line, row=row, col=col)
        figure.add_hline(model["h_thr"], line=line, row=row, col=col)


def _quadrants(figure: go.Figure, models: Sequence[dict], stacked: bool) -> None:
    """Shares of tokens at the model's own thresholds, in the corners that they lie in; earlier files may lack them."""
    for panel, model in enumerate(models):
        row, col = _place(panel, stacked)
        for name, (x, y) in QUADRANTS.items() if "quadrants" in model else ():
            figure.add_annotation(
                text=f"{model['quadrants'][name]:.2%}", x=0.03 + 0.94 * x, y=0.03 + 0.94 * y, xref="x domain",
                yref="y domain", xanchor=("left", "right")[x], yanchor=("bottom", "top")[y], showarrow=False, borderpad=2,
                font={"color": "#111111", "size": 11}, bgcolor="rgba(255,255,255,0.8)", row=row, col=col,
            )  # fmt: skip


def _count_colors(largest: int, log: bool, stacked: bool) -> dict:
    ticks = np.arange(0, 10, 2 if stacked else 1)
    labels = {"tickvals": ticks, "ticktext": [_short(10 ** int(t)) for t in ticks]} if log else {}
    bar = {
        "title": {"text": "tokens", "side": "bottom"},
        "x": 0.24 if stacked else 0.33,
        "len": 0.46 if stacked else 0.55,
    }
    return {
        "colorscale": "Viridis",
        "cmin": 0,
        "cmax": math.log10(largest) or 1 if log else largest,
        "colorbar": _lying(bar | labels),
    }


def _short(count: int) -> str:
    """10, 100, 1k: colour bars are narrow."""
    return str(count) if count < 1000 else f"{count // 1000}k" if count < 1_000_000 else f"{count // 1_000_000}M"


def _difference_colors(largest: float, log: bool, stacked: bool) -> dict:
    decades = (-1, 1) if stacked else range(-2, 3)  # of percentage points; a narrow bar has room for few
    points = [sign * 10.0**decade for decade in decades for sign in (-1, 1)]
    ticks = sorted([0.0, *points])
    labels = {"tickformat": "+.2%"}
    if log:
        labels = {
            "tickvals": np.arcsinh(np.array(ticks) / 100 / DIFFERENCE_UNIT),
            "ticktext": [f"{t:+g}" if t else "0" for t in ticks],
        }
    unit = "points" if stacked else "percentage points"
    bar = {"title": {"text": f"difference, {unit}" if log else "difference", "side": "bottom"}}
    bar |= {"x": 0.76 if stacked else 0.84, "len": 0.46 if stacked else 0.32}
    return {"colorscale": _DIVERGING, "cmin": -largest, "cmax": largest, "colorbar": _lying(bar | labels)}


def _lying(bar: dict) -> dict:
    """A colour bar under the panels."""
    return bar | {
        "orientation": "h",
        "yref": "container",
        "y": 0.02,
        "yanchor": "bottom",
        "thickness": 12,
        "tickangle": 0,
    }
