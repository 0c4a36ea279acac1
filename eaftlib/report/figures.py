"""Pictures of rankings, landscapes and keep-count curves. Every function returns a Picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogFormatter

from ..pruning.explore import overlap
from . import charts
from .colors import BLUE, GOOD, GREY, RECOVERED, VERMILLION, Style, of_criterion
from .model import Curve, Row

if TYPE_CHECKING:  # loads the engine
    from ..pruning.explore import Choice
    from ..recovery.loop import Look

_DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}


class Picture(Figure):
    """A figure that a notebook shows as a PNG wherever it runs, without pyplot and its global state."""

    def draw(self, renderer) -> None:
        """Names of models and packs are text: a ``$`` in them begins no formula, as it does in powers of ten along an axis."""
        axes = [axis for pair in self.axes for axis in (pair.xaxis, pair.yaxis)]
        logarithmic = [axis for axis in axes if isinstance(axis.get_major_formatter(), LogFormatter)]
        powers = {label for axis in logarithmic for label in axis.get_ticklabels(which="both")}
        for text in self.findobj(Text):
            text.set_parse_math(text in powers)
        super().draw(renderer)

    def png(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()

    def _repr_png_(self) -> bytes:
        return self.png()

    def svg(self) -> str:
        """The <svg> element alone, for pages; the same figure gives the same text."""
        buffer = io.StringIO()
        # With a salt, the names of clips and marks come from their content; without, they are drawn anew by each process.
        with rc_context({"svg.hashsalt": "eaftlib"}):
            self.savefig(buffer, format="svg", metadata={"Date": None})
        text = buffer.getvalue()
        return text[text.index("<svg") :]


def saliency_map(scores: np.ndarray, criterion: str, keep: int | None = None) -> Picture:
    """Heat map of scores [L, E] as shares of their layer, experts sorted best first in each layer."""
    share = np.clip(np.nan_to_num(scores), 0, None)
    share = np.sort(share / np.maximum(share.sum(1, keepdims=True), np.finfo(float).tiny), axis=1)[:, ::-1]
    figure, axes = _panel(9, 0.8 + 0.22 * max(8, len(share)))
    image = axes.imshow(
        share, aspect="auto", cmap="magma", norm=LogNorm(max(share[share > 0].min(initial=1), 1e-4), share.max() or 1)
    )
    if keep is not None:
        axes.axvline(keep - 0.5, color="white", linewidth=1.2, linestyle="--")
        axes.annotate(f"keep {keep}", (keep - 0.4, -0.6), fontsize=9, annotation_clip=False)
    axes.set(xlabel="experts, best first", ylabel="layer")
    axes.set_title(f"share of its layer's {criterion}", loc="right")
    figure.colorbar(image, ax=axes, pad=0.02)
    return figure


def keep_set(choice: Choice, criterion: str, other: Choice, other_criterion: str) -> Picture:
    """What charts.keep_set draws, for where nothing draws Plotly's figures: exports, and pages that show outputs alone."""
    scores = np.array(choice.entry["scores"], float)
    share = np.take_along_axis(charts.layer_shares(scores), np.array(choice.entry["ranking"]), axis=1)
    figure = Picture(figsize=(11, 4.2 + 0.16 * max(8, len(share))), layout="constrained")
    panels = figure.subplot_mosaic("mmm;abc", height_ratios=[1.3, 1])
    image = panels["m"].imshow(share, aspect="auto", cmap="viridis", norm=LogNorm())
    kept = np.isin(np.array(choice.entry["ranking"]) + _apart(scores), choice.kept + _apart(scores))
    panels["m"].scatter(*np.nonzero(kept)[::-1], s=16, color="white", edgecolor="black", linewidth=0.7)
    panels["m"].set(xlabel="experts, best first", ylabel="layer")
    figure.colorbar(image, ax=panels["m"], pad=0.01, label="share of its layer")
    parts = ((overlap(choice.kept, other.kept), None), (choice.mass, other.mass), (choice.loss, other.loss))
    for axes, (ours, theirs) in zip((panels[name] for name in "abc"), parts, strict=True):
        if ours is not None:
            axes.bar(range(len(ours)), ours, color=of_criterion(criterion).color, alpha=0.75, label=criterion)
        if theirs is not None:
            axes.hlines(
                theirs, *_ends_of_bars(theirs), color=of_criterion(other_criterion).color, label=other_criterion
            )
        axes.set(xlabel="layer")
    panels["a"].set_ylim(0, choice.kept.shape[1])
    figure.legend(*panels["b"].get_legend_handles_labels(), loc="outside lower right", ncols=2, frameon=False)
    for axes, title in zip(
        panels.values(), charts.keep_set_titles(choice, criterion, other, other_criterion), strict=True
    ):
        axes.set_title(title)
        _tidy(axes)
    return figure


def _apart(scores: np.ndarray) -> np.ndarray:
    """[L, 1], to be added to ids: then no two layers share one."""
    return np.arange(len(scores))[:, None] * scores.shape[1]


def _ends_of_bars(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(len(values)) - 0.4, np.arange(len(values)) + 0.4


def mass_concentration(scores: dict[str, np.ndarray]) -> Picture:
    """Share of a layer's mass in its best k experts, mean over layers, per criterion; the diagonal is no preference."""
    figure, axes = _panel(7, 4)
    for name, values in scores.items():
        ordered = np.sort(np.clip(np.nan_to_num(values), 0, None), axis=1)[:, ::-1]
        share = np.cumsum(ordered, axis=1) / np.maximum(ordered.sum(1, keepdims=True), np.finfo(float).tiny)
        k = np.arange(1, values.shape[1] + 1)
        style = of_criterion(name)
        axes.plot(k, share.mean(0), _DASHES[style.dash], label=name, color=style.color, linewidth=1.8)
    axes.plot([0, k[-1]], [0, 1], color="#bbb", linewidth=1, linestyle=":")
    axes.set(xlabel="experts kept per layer, best first", ylabel="share of the mass", xlim=(0, k[-1]), ylim=(0, 1.01))
    axes.legend(frameon=False, fontsize=9)
    return figure


def reconstruction_loss(losses: dict[str, list[float]]) -> Picture:
    """Predicted loss by experts kept, a line per layer; losses: the criterion ``recon``'s, by count and layer."""
    figure, axes = _panel(7, 4)
    counts, lines = [int(n) for n in losses], np.array(list(losses.values())).T
    colors = colormaps["viridis"](np.linspace(0, 0.9, len(lines)))
    for layer, (line, color) in enumerate(zip(lines, colors, strict=True)):
        ends = layer in (0, len(lines) - 1)
        axes.plot(counts, line, color=color, linewidth=1.2, label=f"layer {layer}" if ends else None)
    axes.plot(counts, lines.mean(0), color=VERMILLION, linewidth=2.2, label="mean")
    axes.set(xlabel="experts kept per layer", ylabel="squared error, share of the experts' output", ylim=(0, None))
    axes.legend(frameon=False, fontsize=9)
    return figure


def criteria_agreement(rankings: dict[str, np.ndarray], keep_n: int) -> Picture:
    """Share of the kept experts that two criteria have in common at ``keep_n``, over all layers."""
    names = list(rankings)
    kept = {n: [set(layer[:keep_n].tolist()) for layer in r] for n, r in rankings.items()}
    common = np.array(
        [[np.mean([len(a & b) / keep_n for a, b in zip(kept[x], kept[y], strict=True)]) for y in names] for x in names]
    )
    size = 1.6 + 0.62 * len(names)
    figure, axes = _panel(size + 1.2, size)
    axes.imshow(common, cmap="Blues", vmin=keep_n / rankings[names[0]].shape[1], vmax=1)
    for (i, j), value in np.ndenumerate(common):
        axes.text(
            j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if value > 0.87 else "black"
        )
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=9)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_title(f"kept experts in common at keep {keep_n}", fontsize=10)
    return figure


class RecoveryCurve:
    """The perplexity of text that is held back over tokens trained on; called with the looks so far, it draws them anew."""

    def __init__(self):
        self._display = None

    def __call__(self, curve: Sequence[Look]) -> None:
        from IPython.display import display

        if self._display is None:
            self._display = display(recovery_curve(curve), display_id=True)
        else:
            self._display.update(recovery_curve(curve))


def recovery_curve(curve: Sequence[Look]) -> Picture:
    """Perplexity and divergence from the whole model over tokens trained on, on text that is held back; the best marked."""
    figure = Picture(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    tokens = [look.tokens / 1e6 for look in curve]
    best = min(range(len(curve)), key=lambda i: curve[i].held_out_kl)
    for axes, values, name in (
        (left, [look.held_out_ppl for look in curve], "perplexity, held back"),
        (right, [look.held_out_kl for look in curve], "KL to the whole model, held back"),
    ):
        axes.plot(tokens, values, marker="o", markersize=4, linewidth=1.6, color=BLUE)
        axes.plot(tokens[best], values[best], marker="*", markersize=12, color=VERMILLION)
        axes.annotate(
            f"{values[best]:.4g}", (tokens[best], values[best]), (0, 8), textcoords="offset points", fontsize=8
        )
        axes.margins(x=0.08, y=0.15)
        axes.set(xlabel="million tokens trained on", ylabel=name)
        _tidy(axes)
    return figure


def sizes(before: dict[str, int], after: dict[str, int]) -> Picture:
    """Bytes of experts and of the rest, before and after pruning; both dicts have ``total`` and ``experts``."""
    figure, axes = _panel(7, 1.9)
    for y, part in enumerate((after, before)):
        rest = part["total"] - part["experts"]
        axes.barh(y, part["experts"] / 1e6, color=BLUE, label="experts" if y else None)
        axes.barh(y, rest / 1e6, left=part["experts"] / 1e6, color=GREY, label="the rest" if y else None)
        axes.text(part["total"] / 1e6, y, f"  {part['total'] / 1e6:,.2f} MB", va="center", fontsize=9)
    axes.set_yticks([0, 1], ["after", "before"])
    axes.set(xlabel="MB", xlim=(0, before["total"] / 1e6 * 1.2))
    axes.legend(frameon=False, fontsize=9, loc="lower right", ncols=2, bbox_to_anchor=(1, 1))
    return figure


def landscape(model: dict, title: str) -> Picture:
    """The (p, H) histogram of one result entry on a log scale, its thresholds drawn, conflicts in the lower left corner."""
    figure, axes = _panel(6.2, 4.4)
    hist = model["hist2d_x_H"]
    counts = np.asarray(hist["counts"], float).reshape(hist["xbins"], hist["ybins"])
    masked = np.ma.masked_equal(counts.T, 0)
    image = axes.pcolormesh(hist["x_edges"], hist["y_edges"], masked, norm=LogNorm(1), cmap="viridis", rasterized=True)
    axes.axvline(model["p_thr"], color=VERMILLION, linewidth=1.2)
    axes.axhline(model["h_thr"], color=VERMILLION, linewidth=1.2)
    axes.annotate(
        f"confident conflicts {model['cc_rate']:.3%}",
        (0.02, 0.02),
        xycoords="axes fraction",
        fontsize=8,
        color=VERMILLION,
    )
    axes.set(xlabel="p, probability of the token that came", ylabel="H, top-K entropy", xlim=(0, 1), ylim=(0, 1))
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes, pad=0.02, label="tokens")
    return figure


def keep_curve(curve: Curve) -> Picture:
    """dPPL over experts kept, a panel per sequence length, the gate drawn. Symlog above the gate.

    A line per criterion; recovered models are stars, which no line joins.
    """
    figure = Picture(figsize=(4.9 * len(curve.limits), 3.9), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(curve.limits), sharey=True))
    stars = [r.comparison.ppl.value for r in curve.rows if r.recovered and r.seq_len in curve.limits]
    bottom = min([-max(curve.limits.values()), *(1.2 * value for value in stars)])  # training may undercut the baseline
    for axes, (seq_len, limit) in zip(panels, curve.limits.items(), strict=True):
        part = [r for r in curve.rows if r.seq_len == seq_len]
        untrained = [r for r in part if not r.recovered]
        for criterion in sorted({r.criterion for r in untrained}):
            line = sorted((r for r in untrained if r.criterion == criterion), key=lambda r: r.keep_n)
            _curve_line(axes, line, of_criterion(criterion), curve.num_experts)
        if stars:
            _recovered_stars(axes, [r for r in part if r.recovered])
        axes.axhspan(-limit, limit, color=GOOD, alpha=0.15, linewidth=0)
        axes.axhline(limit, color=GOOD, linewidth=1.2)
        axes.annotate(
            f"gate {limit:.3f}",
            (0.02, limit),
            xycoords=("axes fraction", "data"),
            fontsize=8,
            va="bottom",
            color=GOOD,
        )
        axes.set_yscale("symlog", linthresh=limit, linscale=0.8)
        axes.set(xlabel=f"experts kept of {curve.num_experts}", title=f"{seq_len} tokens", ylim=(bottom, None))
        axes.set_xticks(sorted({r.keep_n for r in part} | {curve.num_experts}))
        _tidy(axes)
    figure.axes[0].set_ylabel("dPPL")
    figure.axes[-1].legend(frameon=False, fontsize=8)
    return figure


def _curve_line(axes, rows: list[Row], style: Style, num_experts: int) -> None:
    """Rows of one criterion, fewest experts first, and their intervals; the line ends at the whole model's zero."""
    x, y = [r.keep_n for r in rows] + [num_experts], [r.comparison.ppl.value for r in rows] + [0.0]
    axes.plot(
        x, y, _DASHES[style.dash], marker="o", markersize=4, linewidth=1.6, color=style.color, label=rows[0].criterion
    )
    _intervals(axes, rows, style.color)


def _recovered_stars(axes, rows: list[Row]) -> None:
    """Recovered models and their intervals; their series stands in the legend of every panel, where it may be empty."""
    x, y = [r.keep_n for r in rows], [r.comparison.ppl.value for r in rows]
    axes.plot(
        x, y, marker="*", markersize=13, linestyle="none", color=RECOVERED, markeredgecolor="black",
        markeredgewidth=0.7, zorder=3, label="recovered",
    )  # fmt: skip
    _intervals(axes, rows, "black")


def _intervals(axes, rows: list[Row], color: str) -> None:
    bars = [(r.keep_n, *r.comparison.ppl.interval) for r in rows if r.comparison.ppl.interval]
    axes.vlines([k for k, _, _ in bars], [low for _, low, _ in bars], [high for _, _, high in bars], color=color)


def _panel(width: float, height: float):
    figure = Picture(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    _tidy(axes)
    return figure, axes


def _tidy(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.title.set_fontsize(10)
