"""Deltas, intervals, divergences and noise floors against direct implementations."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from test_results import edit, make_legacy, random_tokens, write

from eaftlib.errors import ResultError
from eaftlib.evaluation import results
from eaftlib.evaluation.compare import compare
from eaftlib.evaluation.divergence import js_divergence, swap_floor
from eaftlib.evaluation.statistics import Tokens, cells

KEY = ("UNION", 1024)


def shifted(tokens, seed=5, by=0.1):
    """The same tokens as another, slightly worse model scores them."""
    rng = np.random.default_rng(seed)
    nll = np.maximum(tokens.nll + rng.normal(by, 0.2, len(tokens.nll)), 0).astype(np.float32)
    entropy = np.clip(tokens.entropy + rng.normal(0, 0.05, len(nll)), 0, 1).astype(np.float32)
    return Tokens(tokens.block, tokens.position, nll, entropy)


@pytest.fixture
def pair(tmp_path):
    base = random_tokens(n=4000)
    return [
        results.read(write(tmp_path, label, {KEY: tokens}))
        for label, tokens in (("half", shifted(base)), ("base", base))
    ]


def changed(result, change):
    """As no file could be read, since its numbers do not agree with one another."""
    content = json.loads(result.path.read_text())
    change(content)
    results.tokens_path(result.path).unlink()
    return replace(result, content=content)


def test_deltas_are_differences_of_the_aggregates(pair):
    found = compare(*pair, *KEY)
    cand, base = (r.entries[KEY]["model"] for r in pair)
    assert found.ppl.value == cand["ppl"] - base["ppl"]
    assert found.mean_prob.value == cand["mean_prob"] - base["mean_prob"]
    assert not found.binned


def test_conflicts_count_under_the_baselines_thresholds(pair):
    cand = pair[0].tokens(*KEY)
    model = pair[1].entries[KEY]["model"]
    hits = [
        math.exp(-n) <= model["p_thr"] and h <= model["h_thr"]
        for n, h in zip(cand.nll.tolist(), cand.entropy.tolist(), strict=True)
    ]
    found = compare(*pair, *KEY)
    assert found.cc_rate_at_base == pytest.approx(sum(hits) / len(hits), abs=1e-12)
    assert found.cc.value == pytest.approx(sum(hits) / len(hits) - model["cc_rate"], abs=1e-12)
    assert found.cc_rate_at_base != pair[0].entries[KEY]["model"]["cc_rate"]


def test_conflicts_at_base_by_hand(tmp_path):
    """Baseline p 0.2, 0.4, .., 1 and H = p: at quantile 0.15 both thresholds are 0.32. Two of the candidate's five fit."""
    p = np.array([0.2, 0.4, 0.6, 0.8, 1.0])
    where = (np.zeros(5, np.int32), np.arange(1, 6, dtype=np.int32))
    base = Tokens(*where, -np.log(p).astype(np.float32), p.astype(np.float32))
    p, h = np.array([0.1, 0.3, 0.3, 0.33, 0.9]), np.array([0.1, 0.31, 0.33, 0.1, 0.1], np.float32)
    cand = Tokens(*where, -np.log(p).astype(np.float32), h)
    pair = [results.read(write(tmp_path, n, {KEY: t})) for n, t in (("c", cand), ("b", base))]
    assert pair[1].entries[KEY]["model"]["p_thr"] == pytest.approx(0.32)
    assert compare(*pair, *KEY).cc_rate_at_base == pytest.approx(0.4)


def test_a_constant_difference_has_an_interval_of_no_width(tmp_path):
    """Every token of one model has p = 1/2, of the other 1/4: perplexities 2 and 4, whichever blocks are drawn."""
    base = random_tokens()
    half, quarter = (replace(base, nll=np.full(400, math.log(n), np.float32)) for n in (2, 4))
    pair = [results.read(write(tmp_path, n, {KEY: t})) for n, t in (("c", quarter), ("b", half))]
    assert compare(*pair, *KEY).mean_prob.interval == pytest.approx((-0.25, -0.25))
    assert compare(*pair, *KEY).ppl.interval == pytest.approx((2.0, 2.0))
    wide = [results.read(write(tmp_path, n, {KEY: t})) for n, t in (("d", base), ("e", half))]
    low, high = compare(*wide, *KEY).mean_prob.interval
    assert low < high


def test_blocks_without_a_kept_token_do_no_harm(tmp_path):
    base = random_tokens(n=40, num_blocks=2)
    pair = [results.read(write(tmp_path, n, {KEY: t})) for n, t in (("c", shifted(base)), ("b", base))]
    assert all(math.isfinite(x) for x in compare(*pair, *KEY).ppl.interval)


def test_a_model_does_not_differ_from_itself(pair):
    found = compare(pair[1], pair[1], *KEY)
    for delta in (found.ppl, found.cc, found.mean_prob):
        assert delta.value == 0 and delta.interval == (0.0, 0.0)
    assert found.js2d.value == found.js2d.floor == found.js2d.estimate == 0 and found.js2d.interval == (0.0, 0.0)


@pytest.mark.parametrize("sharpness", [1, 6])
def test_a_model_does_not_differ_from_itself_where_only_json_is_at_hand(tmp_path, sharpness):
    """Trained models are sure of most tokens: the H threshold then lies inside the first bin of the histogram."""
    tokens = random_tokens(n=4000)
    tokens = Tokens(tokens.block, tokens.position, tokens.nll, tokens.entropy**sharpness)
    path = write(tmp_path, "base", {KEY: tokens})
    results.tokens_path(path).unlink()
    found = compare(results.read(path), results.read(path), *KEY)
    assert found.binned and found.cc.value == 0


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_js_divergence_against_its_definition(pairs):
    a, b = zip(*pairs, strict=True)
    assume(sum(a) and sum(b))
    p, q = [x / sum(a) for x in a], [x / sum(b) for x in b]

    def kl(u, v):
        return sum(x * math.log(x / y) for x, y in zip(u, v, strict=True) if x > 0)

    middle = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    found = js_divergence(a, b)
    assert found == pytest.approx((kl(p, middle) + kl(q, middle)) / 2, abs=1e-12)
    assert found == pytest.approx(js_divergence(b, a), abs=1e-15)
    assert 0 <= found <= math.log(2) + 1e-12


def test_js_divergence_at_its_bounds():
    assert js_divergence([1, 0], [0, 7]) == pytest.approx(math.log(2))
    assert js_divergence([3, 5, 0], [6, 10, 0]) == 0


@pytest.mark.parametrize("counts", [[0, 0], [math.nan, 1], [math.inf, 1], []])
def test_an_empty_or_non_finite_histogram_has_no_divergence(counts):
    for pair in ((counts, [1, 1][: len(counts)]), ([1, 1][: len(counts)], counts)):
        with pytest.raises(ResultError, match=f"a histogram is empty or not finite: its {len(counts)} counts sum to"):
            js_divergence(*pair)


def test_the_comparison_with_an_empty_histogram_is_named(pair):
    def empty(content):
        histogram = content["packs"][0]["seq"]["1024"]["model"]["hist2d_x_H"]
        histogram["counts"] = [0] * len(histogram["counts"])

    with pytest.raises(ResultError, match="JS2D of half and base on UNION at 1024: a histogram is empty"):
        compare(changed(pair[0], empty), pair[1], *KEY)


def test_js2d_is_that_of_the_two_histograms(pair):
    counts = [np.bincount(cells(t.probability, t.entropy), minlength=19200) for t in (r.tokens(*KEY) for r in pair)]
    assert compare(*pair, *KEY).js2d.value == pytest.approx(js_divergence(*counts), abs=1e-12)


def test_swap_floor_of_independent_tokens_has_the_analytic_size():
    """(cells - 1) / (4 N) for two independent samples of the same distribution."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 200, (2, 20_000))
    assert swap_floor(a, b, rng) == pytest.approx(199 / (4 * 20_000), rel=0.1)


def test_swap_floor_does_not_grow_with_the_difference():
    """All of one model's tokens in one cell, all of the other's in another: only the random swap is left."""
    a, b = np.zeros(10_000, int), np.ones(10_000, int)
    floor = swap_floor(a, b, np.random.default_rng(0))
    assert floor < 1e-3 < js_divergence(np.bincount(a, minlength=2), np.bincount(b, minlength=2))


def test_the_floor_of_a_comparison_is_reproducible_and_below_the_divergence(pair):
    first, again = compare(*pair, *KEY), compare(*pair, *KEY)
    assert first == again and 0 < first.js2d.floor < first.js2d.value


def test_earlier_files_are_compared_as_binned(pair):
    for r in pair:
        make_legacy(r.path)
    old = [results.read(r.path) for r in pair]
    found = compare(*old, *KEY)
    assert found.binned and found.ppl.interval is None and found.cc.interval is None
    cand, base = (r.entries[KEY]["model"] for r in old)
    assert found.ppl.value == cand["ppl"] - base["ppl"]
    occupied = sum(a + b > 0 for a, b in zip(*(m["hist2d_x_H"]["counts"] for m in (cand, base)), strict=True))
    assert found.js2d.floor == pytest.approx((occupied - 1) / (4 * 4000))


def test_binned_conflicts_are_near_the_exact_ones(pair):
    exact = compare(*pair, *KEY).cc_rate_at_base
    for r in pair:
        make_legacy(r.path)
    assert compare(*(results.read(r.path) for r in pair), *KEY).cc_rate_at_base == pytest.approx(exact, abs=0.005)


@pytest.mark.parametrize(
    "where, found, expected",
    [
        ("rows_sha256", "r1", "r0"),
        ("rows_seen", 31, 30),
        ("meta.tokenizer_sha256", "t1", "t0"),
        ("meta.num_blocks", 16, 8),
        ("meta.entropy_topk", 10, 20),
        ("meta.cc_quantile", 0.2, 0.15),
        ("model.kept_tokens", 3999, 4000),
    ],
)
def test_results_of_different_runs_are_not_compared(pair, where, found, expected):
    def change(content):
        part = content["packs"][0]["seq"]["1024"]
        target = content["meta"] if "meta." in where else part["model"] if "model." in where else part
        target[where.split(".")[-1]] = found

    with pytest.raises(ResultError) as error:
        compare(changed(pair[0], change), pair[1], *KEY)
    for word in ("half", "base", "UNION", "1024", where.split(".")[-1], str(found), str(expected)):
        assert word in str(error.value)


def test_different_kept_positions_are_not_compared(pair, tmp_path):
    tokens = pair[1].tokens(*KEY)
    moved = Tokens(tokens.block, tokens.position + 1, tokens.nll, tokens.entropy)
    other = results.read(write(tmp_path / "other", "other", {KEY: moved}))
    with pytest.raises(ResultError, match="other and base kept different tokens of UNION at 1024"):
        compare(other, pair[1], *KEY)


def test_a_missing_pack_or_length_says_what_there_is(pair):
    with pytest.raises(
        ResultError, match=r"half\.json has no pack UNION at seq_len 2048; it has \[\('UNION', 1024\)\]"
    ):
        compare(*pair, "UNION", 2048)


def test_kl_and_agreement_are_passed_on(pair):
    edit(pair[0].path, lambda c: c["packs"][0]["seq"]["1024"]["model"].update(kl_to_base=0.25, top1_agreement=0.75))
    found = compare(results.read(pair[0].path), pair[1], *KEY)
    assert (found.kl_to_base, found.top1_agreement) == (0.25, 0.75)
    assert json.loads(pair[1].path.read_text())["packs"][0]["seq"]["1024"]["model"].get("kl_to_base") is None
