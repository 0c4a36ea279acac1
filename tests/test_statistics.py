"""Aggregates against hand-computed cases and loops in plain Python."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_criteria import quantile

from eaftlib.evaluation.statistics import H_BINS, P_BINS, Tokens, aggregate, cells, histogram2d


def tokens_of(p, h, block=None):
    n = len(p)
    block = np.zeros(n, np.int32) if block is None else np.array(block, np.int32)
    nll = np.array([-math.log(x) if x > 0 else 200.0 for x in p], np.float32)
    return Tokens(block, np.arange(1, n + 1, dtype=np.int32), nll, np.array(h, np.float32))


def test_six_tokens_by_hand():
    tokens = tokens_of([1.0, 0.5, 0.25, 0.5, 0.125, 1.0], [0.0, 0.5, 0.25, 1.0, 0.125, 0.75], [0, 0, 0, 2, 2, 2])
    found = aggregate(tokens, num_blocks=4, cc_quantile=0.4)
    # p sorted .125 .25 .5 .5 1 1 and H sorted 0 .125 .25 .5 .75 1: the 0.4 quantile is the third of six values.
    assert found["p_thr"] == pytest.approx(0.5, rel=1e-6) and found["h_thr"] == pytest.approx(0.25)
    # At or below both: (.25, .25) and (.125, .125).
    assert found["cc_count"] == 2 and found["cc_rate"] == pytest.approx(2 / 6)
    assert found["quadrants"] == pytest.approx({"LL": 2 / 6, "LH": 2 / 6, "HL": 1 / 6, "HH": 1 / 6})
    assert found["mean_prob"] == pytest.approx(3.375 / 6) and found["mean_entropy"] == pytest.approx(2.625 / 6)
    assert found["mean_nll"] == pytest.approx(7 * math.log(2) / 6)
    assert found["ppl"] == pytest.approx(2 ** (7 / 6))
    assert found["kept_tokens"] == 6
    blocks = found["blocks"]
    assert blocks["kept"] == [3, 0, 3, 0] and blocks["conflicts"] == [1, 0, 1, 0]
    assert blocks["nll_sum"] == pytest.approx([3 * math.log(2), 0, 4 * math.log(2), 0])
    assert blocks["prob_sum"] == pytest.approx([1.75, 0, 1.625, 0])
    assert blocks["entropy_sum"] == pytest.approx([0.75, 0, 1.875, 0])


def test_thresholds_interpolate_between_order_statistics():
    found = aggregate(tokens_of([0.25, 0.5], [0.0, 1.0]), 1, 0.15)
    assert found["p_thr"] == pytest.approx(0.2875) and found["h_thr"] == pytest.approx(0.15)


share = st.floats(0, 1, width=32)


@given(st.lists(st.tuples(share, share, st.integers(0, 3)), min_size=1, max_size=60), st.floats(0.01, 0.99))
def test_aggregates_equal_loops(values, cc_quantile):
    values.sort(key=lambda v: v[2])
    tokens = tokens_of(*zip(*values, strict=True))
    nll, h = tokens.nll.tolist(), tokens.entropy.tolist()
    p, n = tokens.probability.tolist(), len(nll)
    assert p == pytest.approx([math.exp(-x) for x in nll], rel=1e-14)
    found = aggregate(tokens, 4, cc_quantile)
    p_thr, h_thr = quantile(p, cc_quantile), quantile(h, cc_quantile)
    assert found["p_thr"] == pytest.approx(p_thr) and found["h_thr"] == pytest.approx(h_thr)
    low = [(a <= found["p_thr"], b <= found["h_thr"]) for a, b in zip(p, h, strict=True)]
    quadrants = {"LL": (True, True), "LH": (True, False), "HL": (False, True), "HH": (False, False)}
    assert found["quadrants"] == pytest.approx({name: low.count(pair) / n for name, pair in quadrants.items()})
    assert found["cc_count"] == low.count((True, True)) and found["cc_rate"] == found["cc_count"] / n
    mean = math.fsum(nll) / n
    assert found["mean_nll"] == pytest.approx(mean) and found["ppl"] == pytest.approx(math.exp(mean))
    assert found["var_nll"] == pytest.approx(math.fsum((x - mean) ** 2 for x in nll) / n, abs=1e-9)
    for name, series in (
        ("nll_sum", nll),
        ("prob_sum", p),
        ("entropy_sum", h),
        ("conflicts", [a and b for a, b in low]),
    ):
        sums = [math.fsum(x for x, v in zip(series, values, strict=True) if v[2] == b) for b in range(4)]
        assert found["blocks"][name] == pytest.approx(sums)
    assert found["blocks"]["kept"] == [sum(v[2] == b for v in values) for b in range(4)]


@pytest.mark.parametrize(
    "p, h, cell",
    [(0, 0, (0, 0)), (1, 1, (159, 119)), (0.5, 0.5, (80, 60)), (0.9999, 0.0001, (159, 0)), (1 / 160, 1 / 120, (1, 1))],
)
def test_histogram_cells(p, h, cell):
    assert np.argwhere(histogram2d(np.array([p], float), np.array([h], float))).tolist() == [list(cell)]


@given(st.lists(st.tuples(share, share), min_size=1, max_size=40))
def test_histogram_against_its_edges(values):
    """Each token lies in the one cell whose edges enclose it (the last bin is closed), up to rounding of an edge."""
    found = aggregate(tokens_of(*zip(*values, strict=True)), 1, 0.15)
    hist = found["hist2d_x_H"]
    assert (hist["xbins"], hist["ybins"]) == (P_BINS, H_BINS) == (160, 120)
    assert hist["x_edges"] == pytest.approx([i / 160 for i in range(161)])
    assert hist["y_edges"] == pytest.approx([i / 120 for i in range(121)])
    assert sum(hist["counts"]) == len(values) and len(hist["counts"]) == 160 * 120
    counts = np.array(hist["counts"]).reshape(160, 120)
    assert found["hist1d_x"]["counts"] == counts.sum(axis=1).tolist()
    assert found["hist1d_H"]["counts"] == counts.sum(axis=0).tolist()
    p, h = (np.array(x, np.float32) for x in zip(*values, strict=True))
    for a, b, cell in zip(p.tolist(), h.tolist(), cells(p, h).tolist(), strict=True):
        x, y = divmod(cell, 120)
        assert x / 160 - 1e-9 <= a <= (x + 1) / 160 + 1e-9 and y / 120 - 1e-9 <= b <= (y + 1) / 120 + 1e-9
