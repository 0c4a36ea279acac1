"""Interactive charts: every trace's values against inputs computed here, the same JSON for the same input, hostile names."""

import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import plotly.graph_objects as go
import pytest
from test_results import edit, make_legacy, random_tokens, write

from eaftlib.errors import ResultError
from eaftlib.evaluation.compare import Delta
from eaftlib.evaluation.gates import Check
from eaftlib.evaluation.statistics import Tokens, aggregate
from eaftlib.pruning.criteria import CRITERIA, RANDOM, RECON
from eaftlib.report import charts, colors, compare
from eaftlib.report.model import Curve, Recovered

HOSTILE = '</script><script>alert(1)</script><b>"x"</b>'


def tokens(seed, n=3000):
    rng = np.random.default_rng(seed)
    p, h = rng.beta(2, 1, n), rng.beta(1, 3, n)
    zeros = np.zeros(n, np.int32)
    return Tokens(
        block=zeros, position=np.arange(1, n + 1, dtype=np.int32), nll=-np.log(p).astype(np.float32),
        entropy=h.astype(np.float32), **({"row": zeros} if "row" in Tokens.__dataclass_fields__ else {}),
    )  # fmt: skip


@pytest.fixture(scope="module")
def pair():
    """(tokens, entry) of two models."""
    found = [tokens(1), tokens(2)]
    return [(t, aggregate(t, 1, 0.15)) for t in found]


def cells_by_hand(part):
    """Counts {(p bin, H bin): tokens}, a token at a time."""
    counts = {}
    for nll, h in zip(part.nll, part.entropy, strict=True):
        p = math.exp(-float(nll))
        cell = (min(int(p * 160), 159), min(int(float(h) * 120), 119))
        counts[cell] = counts.get(cell, 0) + 1
    return counts


def filled(heat):
    """{(x index, y index): z} of the cells that are drawn."""
    z = np.asarray(heat.z)
    return {(int(x), int(y)): float(z[y, x]) for y, x in zip(*np.nonzero(~np.isnan(z)), strict=True)}


@pytest.mark.parametrize("log", [True, False])
def test_landscapes_hold_both_histograms_and_their_difference(pair, log):
    (t_left, left), (t_right, right) = pair
    figure = charts.landscapes(left, right, ("a", "b"), log=log)
    a, b = cells_by_hand(t_left), cells_by_hand(t_right)
    for heat, cells in zip(figure.data[:2], (a, b), strict=True):
        assert len(heat.x) == 160 and len(heat.y) == 120 and heat.x[0] == pytest.approx(0.5 / 160)
        expected = {cell: math.log10(n) if log else n for cell, n in cells.items()}
        assert filled(heat) == pytest.approx(expected, rel=1e-6)
        assert all(heat.customdata[y][x] == n for (x, y), n in cells.items())
    difference = {cell: (b.get(cell, 0) - a.get(cell, 0)) / 3000 for cell in {*a, *b}}
    drawn = {cell: math.asinh(d / 1e-5) if log else d for cell, d in difference.items()}
    assert filled(figure.data[2]) == pytest.approx(drawn, rel=1e-5, abs=1e-7)
    (x, y), value = max(difference.items(), key=lambda item: abs(item[1]))
    assert figure.data[2].customdata[y][x] == pytest.approx(100 * value, rel=1e-5)
    limits = figure.layout.coloraxis2
    assert limits.cmax == -limits.cmin == pytest.approx(max(map(abs, drawn.values())), rel=1e-5)


def test_landscapes_draw_each_models_thresholds_and_quadrants(pair):
    left, right = pair[0][1], pair[1][1]
    figure = charts.landscapes(left, right, ("a", "b"))
    lines = [(s.x0, s.y0) for s in figure.layout.shapes]  # vertical and horizontal in turn
    expected = [value for m in (left, right, left, right) for value in (m["p_thr"], m["h_thr"])]
    assert [line[i % 2] for i, line in enumerate(lines)] == expected
    shown = [a.text for a in figure.layout.annotations]
    assert shown[:3] == ["a", "b", "b minus a"]
    expected = [f"{m['quadrants'][q]:.2%}" for m in (left, right) for q in ("LL", "LH", "HL", "HH")]
    assert shown[3:] == expected
    corner = {a.text: (a.xanchor, a.yanchor) for a in figure.layout.annotations[3:7]}
    assert corner[f"{left['quadrants']['HL']:.2%}"] == ("right", "bottom")  # high p, low H


def test_an_earlier_entry_without_quadrants_and_sums_is_drawn_from_its_histogram(pair):
    old = [{k: m[k] for k in ("hist2d_x_H", "p_thr", "h_thr")} for _, m in pair]
    assert len(charts.landscapes(*old, ("a", "b")).layout.annotations) == 3
    for new, found in zip(
        charts.distributions(pair[0][1], pair[1][1], ("a", "b")).data,
        charts.distributions(*old, ("a", "b")).data,
        strict=True,
    ):
        np.testing.assert_array_equal(new.customdata, found.customdata)
        np.testing.assert_allclose(new.x, found.x)


def test_distributions_are_shares_of_tokens(pair):
    figure = charts.distributions(pair[0][1], pair[1][1], ("a", "b"))
    assert [trace.name for trace in figure.data] == ["a", "b", "a", "b"]
    for trace, values, bins in (
        (figure.data[0], np.exp(-pair[0][0].nll.astype(float)), 160),
        (figure.data[3], pair[1][0].entropy.astype(float), 120),
    ):
        counts = np.histogram(values, bins, (0, 1))[0]
        np.testing.assert_array_equal(trace.customdata, counts)
        np.testing.assert_allclose(trace.y, np.where(counts, counts / 3000, np.nan))


def test_a_scale_is_linear_within_its_unit_logarithmic_beyond_and_labelled_with_values():
    scale = charts.Scale(0.1)
    assert list(scale([0, 0.01, -0.01])) == pytest.approx([0, 0.0998, -0.0998], rel=1e-3)
    a, b, c = scale([1, 10, 100])
    assert b - a == pytest.approx(math.log(10), rel=1e-2) and c - b == pytest.approx(math.log(10), rel=1e-4)
    assert math.isnan(scale([None])[0])
    axis = scale.axis(-0.2, 30)
    assert 3 <= len(axis["tickvals"]) <= 12 and "0" in axis["ticktext"] and "10" in axis["ticktext"]
    for position, label in zip(axis["tickvals"], axis["ticktext"], strict=True):
        assert 0.1 * math.sinh(position) == pytest.approx(float(label), abs=1e-12)
        assert axis["range"][0] <= position <= axis["range"][1]


def row(label, criterion, keep_n, dppl, interval=None, seq_len=64, recovered=None, is_baseline=False):
    comparison = SimpleNamespace(ppl=Delta(dppl, interval))
    return SimpleNamespace(
        label=label, criterion=criterion, keep_n=keep_n, recovered=recovered, seq_len=seq_len, comparison=comparison,
        is_baseline=is_baseline,
    )  # fmt: skip


ROWS = (
    row("r16", "reap", 16, 1.5, (1.2, 1.9)),
    row("r24", "reap", 24, 0.05, (-0.02, 0.2)),
    row("m16", "reap_mass", 16, 0.7),
    row("star", "reap_mass", 12, -0.01, (-0.03, 0.01), recovered=Recovered(0.03, 1000)),
    row("r16", "reap", 16, 1.1, (1.0, 1.2), seq_len=128),
)


def test_the_curve_draws_every_row_once_with_its_interval_and_ends_at_the_whole_model():
    figure = charts.keep_curve(Curve(ROWS, {64: 0.1, 128: 0.2}, 32))
    reap, mass, star, long = figure.data
    assert [t.name for t in figure.data] == ["reap", "reap_mass", "recovered", "reap"]
    assert [t.showlegend for t in figure.data] == [True, True, True, False]
    assert list(reap.x) == [16, 24, 32] and list(long.x) == [16, 32] and long.xaxis == "x2"
    for trace, values in ((reap, [1.5, 0.05, 0]), (mass, [0.7, 0]), (star, [-0.01]), (long, [1.1, 0])):
        assert [0.1 * math.sinh(y) for y in trace.y] == pytest.approx(
            values, abs=1e-12
        )  # the smallest gate is the unit
    ends = [0.1 * math.sinh(y - e) for y, e in zip(reap.y, reap.error_y.arrayminus, strict=False)]
    ends += [0.1 * math.sinh(y + e) for y, e in zip(reap.y, reap.error_y.array, strict=False)]
    assert ends == pytest.approx([1.2, -0.02, 1.9, 0.2])
    assert np.isnan(mass.error_y.array).all()
    assert star.mode == "markers" and star.marker.symbol == "star" and reap.mode == "lines+markers"
    assert [list(c) for c in reap.customdata] == [
        ["r16", 1.5, 1.2, 1.9, 16],
        ["r24", 0.05, -0.02, 0.2, 24],
        ["the whole model", 0.0, "", "", 32],
    ]


def test_the_curves_gate_is_a_band_in_each_panel_and_all_is_inside_the_axis():
    figure = charts.keep_curve(Curve(ROWS, {64: 0.1, 128: 0.2}, 32))
    bands = [(0.1 * math.sinh(s.y0), 0.1 * math.sinh(s.y1)) for s in figure.layout.shapes]
    assert bands == [pytest.approx((-0.1, 0.1)), pytest.approx((-0.2, 0.2))]
    assert [a.text for a in figure.layout.annotations[2:]] == ["gate ±0.100", "gate ±0.200"]
    low, high = (0.1 * math.sinh(end) for end in figure.layout.yaxis.range)
    assert low < -0.2 and high > 1.9


def test_each_criterion_has_a_look_of_its_own_in_all_charts():
    looks = [colors.of_criterion(name) for name in (*CRITERIA, RECON, RANDOM)]
    assert len(set(looks)) == len(looks) == len({*CRITERIA, RECON, RANDOM})
    figure = charts.keep_curve(Curve(ROWS, {64: 0.1, 128: 0.2}, 32))
    assert figure.data[0].line.color == figure.data[3].line.color == colors.of_criterion("reap").color
    assert colors.of_criterion("new") == colors.of_criterion("new") not in looks


def test_quality_against_size_has_a_point_per_model_whose_size_is_known():
    base = row("base", None, 32, 0.0, is_baseline=True)
    sizes = {"base": 13_760_000_000, "r16": 8_680_000_000, "star": 7_600_000_000}
    figure = charts.quality_against_size([base, *ROWS[:4]], sizes, 0.1)
    found = {t.name: [(x, c[0], c[1]) for x, c in zip(t.x, t.customdata, strict=True)] for t in figure.data}
    assert found == {
        "baseline": [(13.76, "base", 0.0)],
        "reap": [(8.68, "r16", 1.5)],
        "recovered": [(7.6, "star", -0.01)],
    }
    assert "GB" in figure.layout.xaxis.title.text
    small = charts.quality_against_size([base], {"base": 5_000_000}, 0.1)
    assert list(small.data[0].x) == [5.0] and "MB" in small.layout.xaxis.title.text


SCORES = np.array([[4.0, 1.0, -2.0, 5.0], [np.nan, 2.0, 2.0, 4.0]])
ORDER = np.array([[3, 0, 1, 2], [3, 1, 2, 0]])
RANKING = {
    "criteria": {
        "reap": {"scores": [[None if np.isnan(x) else x for x in s] for s in SCORES], "ranking": ORDER.tolist()}
    }
}


@pytest.mark.parametrize("best_first", [True, False])
def test_saliency_is_shares_of_layers_with_the_kept_experts_marked(best_first):
    kept = np.array([[0, 3], [1, 2]])
    heat, marks = charts.saliency(RANKING, "reap", kept, best_first).data
    share = {(0, 0): 0.4, (0, 1): 0.1, (0, 3): 0.5, (1, 1): 0.25, (1, 2): 0.25, (1, 3): 0.5}  # by layer and expert id
    found = {(y, int(heat.customdata[y][x][0])): 10**z for (x, y), z in filled(heat).items()}
    assert found == pytest.approx(share)
    ids = [[int(c[0]) for c in line] for line in heat.customdata]
    assert ids == (ORDER.tolist() if best_first else [[0, 1, 2, 3]] * 2)
    at = [ids[y][x] for x, y in zip(marks.x, marks.y, strict=True)]
    assert sorted(zip(marks.y, at, strict=True)) == [(0, 0), (0, 3), (1, 1), (1, 2)]


def test_a_layer_without_a_positive_score_is_empty():
    assert np.isnan(charts.layer_shares(np.array([[-1.0, 0.0], [np.nan, np.nan]]))).all()


def test_gates_are_bars_in_limits_with_their_intervals():
    fields = {"evidence": "UNDECIDED", "blocks_to_decide": 40}
    checks = (
        Check("dPPL", 64, 0.3, 0.1, "FAIL", interval=(0.25, 0.36), **(fields | {"evidence": "DIFFERENT"})),
        Check("JS2D", 64, 0.01, 0.02, "PASS", interval=(-0.002, 0.008), **fields),
        Check("dCC", 64, -0.001, 0.002, "PASS", interval=None, evidence=None, blocks_to_decide=None),
    )
    bars, lines = charts.gates(SimpleNamespace(label=HOSTILE, checks=checks)).data
    assert [math.sinh(x) for x in bars.x] == pytest.approx([3, 0.5, -0.5])
    assert list(bars.y) == ["dPPL, 64", "JS2D, 64", "dCC, 64"]
    assert list(bars.marker.color) == [colors.BAD, colors.GOOD, colors.GOOD]
    ends = [math.sinh(x) for x in lines.x if not math.isnan(x)]
    assert ends == pytest.approx([2.5, 3.6, -0.1, 0.4]) and list(lines.y) == [
        *["dPPL, 64"] * 2,
        None,
        *["JS2D, 64"] * 2,
        None,
    ]
    assert [list(c) for c in bars.customdata] == [
        [0.3, 0.1, 0.25, 0.36, "FAIL", "DIFFERENT"],
        [0.01, 0.02, -0.002, 0.008, "PASS", "UNDECIDED"],
        [-0.001, 0.002, "", "", "PASS", "no interval"],
    ]


def every_chart(pair):
    left, right = pair[0][1], pair[1][1]
    rows = [row(HOSTILE, HOSTILE, 16, 0.2), *ROWS]
    return [
        charts.landscapes(left, right, (HOSTILE, "b")),
        charts.landscapes(left, right, (HOSTILE, "b"), stacked=True),
        charts.distributions(left, right, (HOSTILE, "b")),
        charts.keep_curve(Curve(tuple(rows), {64: 0.1, 128: 0.2}, 32)),
        charts.keep_curve(Curve(tuple(rows), {64: 0.1, 128: 0.2}, 32), stacked=True),
        charts.quality_against_size(rows, {HOSTILE: 10}, 0.1),
        charts.saliency(RANKING, "reap"),
    ]


def test_backgrounds_are_transparent_and_texts_follow_the_template(pair):
    for figure in every_chart(pair):
        assert {figure.layout.paper_bgcolor, figure.layout.plot_bgcolor} == {"rgba(0,0,0,0)"}
        figure.update_layout(template=charts.template(dark=True))
        assert figure.layout.font.color is None and figure.layout.template.layout.font.color == "#e8eaed"


def test_names_are_escaped_wherever_plotly_reads_tags(pair):
    for figure in every_chart(pair):
        text = json.dumps(json.loads(figure.to_json()))  # Plotly's own JSON has no "<" at all
        assert "<script" not in text and "<b>" not in text
        assert "&lt;script&gt;" in text or (figure.data[0].type == "heatmap" and len(figure.data) == 1)


def test_two_processes_make_the_same_json(tmp_path):
    code = (
        "import sys; sys.path.insert(0, 'tests'); import test_charts as t; "
        "pair = [(x, t.aggregate(x, 1, 0.15)) for x in (t.tokens(1), t.tokens(2))]; "
        "print(*[f.to_json() for f in t.every_chart(pair)], sep=chr(10))"
    )
    texts = [
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert texts[0] == texts[1] and len(texts[0].splitlines()) == 7
    assert all(isinstance(json.loads(line)["data"], list) for line in texts[0].splitlines())


@pytest.fixture
def files(tmp_path):
    a = {
        ("UNION", 64): random_tokens(seed=1),
        ("UNION", 128): random_tokens(seed=2),
        ("only", 64): random_tokens(seed=5),
    }
    b = {("UNION", 64): random_tokens(seed=3), ("UNION", 128): random_tokens(seed=4)}
    return write(tmp_path, "a", a), write(tmp_path, "b", b)


def test_the_one_liner_compares_two_files(files, capsys):
    import pyarrow.parquet as pq

    found = compare(*map(str, files))
    assert found.seq_len == 64 and compare(*files, seq_len=128).seq_len == 128
    values = []
    for file in files:
        table = pq.read_table(file.with_name(f"{file.stem}.tokens.parquet")).to_pandas()
        values.append(table[(table["pack"] == "UNION") & (table["seq_len"] == 64)])
    ppl = [math.exp(v["nll"].astype(float).mean()) for v in values]
    cells = {name: rest for name, *rest in found.rows}
    assert cells["PPL"][:3] == [f"{ppl[0]:.4f}", f"{ppl[1]:.4f}", f"{ppl[1] - ppl[0]:+.4f}"]
    low, high = map(float, cells["PPL"][3].strip("[]").split(", "))
    assert low < ppl[1] - ppl[0] < high
    assert "KL to the whole model, nats" not in cells
    assert isinstance(found.landscapes, go.Figure) and len(found.distributions.data) == 4
    assert "PPL" in repr(found)


def test_the_one_liner_shows_an_earlier_files_label_as_text(files):
    """Labels of today are names of files; an earlier file may hold anything."""
    make_legacy(files[1])
    edit(files[1], lambda content: content["meta"].update(label=HOSTILE))
    found = compare(*files)._repr_html_()
    assert "<script" not in found and "&lt;script" in found


def test_the_one_liner_is_displayed_as_a_table_and_two_figures(files, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda *parts, **_: shown.extend(parts))
    compare(*files)._ipython_display_()
    assert ["text/html" in part if isinstance(part, dict) else type(part) for part in shown] == [
        True,
        go.Figure,
        go.Figure,
    ]


def test_the_one_liner_names_what_two_files_do_not_share(files):
    with pytest.raises(ResultError, match=r"share no sequence length of only: they have \[\('UNION', 64\)"):
        compare(*files, pack="only")
    with pytest.raises(ResultError, match="no pack UNION at seq_len 256"):
        compare(*files, seq_len=256)


def test_importing_the_report_room_loads_no_plotly():
    code = "import sys, eaftlib.report as r; print('plotly' in sys.modules); print(r.compare.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "compare"]
