"""Intervals and the divergence without bias: against loops, closed forms, and how often they hold a truth that is known."""

import math
from dataclasses import replace

import numpy as np
import pytest
from test_results import edit, write

from eaftlib.evaluation import divergence, resampling, results
from eaftlib.evaluation.compare import compare
from eaftlib.evaluation.divergence import js_divergence, swap_floor, unbiased
from eaftlib.evaluation.resampling import Sample, Sums, paired_intervals
from eaftlib.evaluation.statistics import Tokens, conflicts

KEY = ("UNION", 64)


def conversations(rng, count=60, effect=0.6, seq_len=64, harder=0.1):
    """Tokens of both models: conversations of 5 to 60 kept tokens, hard or easy as a whole, cut into blocks as they come.

    The candidate is worse, in some conversations more than in others.
    """
    lengths = rng.integers(5, 61, count)
    row = np.repeat(np.arange(count, dtype=np.int32), lengths)
    place = np.arange(len(row)) + np.arange(len(row)) // (seq_len - 1) + 1  # the first of a block is never kept
    hard = rng.normal(0, effect, count)[row]
    worse = (harder + rng.normal(0, 0.15, count))[row]
    base = rng.gamma(2.0, 0.5, len(row)) * np.exp(hard)
    cand = np.maximum(base + worse + rng.normal(0, 0.2, len(row)), 0)
    blocks, positions = (place // seq_len).astype(np.int32), (place % seq_len).astype(np.int32)

    def tokens(nll):
        unsure = np.clip(1 / (1 + np.exp(0.8 - 0.5 * nll)) + rng.normal(0, 0.25, len(nll)), 0, 1)
        return Tokens(blocks, positions, nll.astype(np.float32), unsure.astype(np.float32), row)

    return tokens(cand), tokens(base)


def saved(folder, cand, base):
    last = int(base.block.max()) + 1
    assert last >= 8
    return [
        results.read(write(folder, label, {KEY: tokens}, {"num_blocks": last}))
        for label, tokens in (("cand", cand), ("base", base))
    ]


@pytest.fixture
def few_blocks(monkeypatch):
    """test_results' entries have eight blocks; these have more."""
    import test_results

    aggregate = test_results.aggregate
    monkeypatch.setattr(test_results, "aggregate", lambda t, _, q: aggregate(t, int(t.block.max()) + 1, q))


def bootstrap(cand, base, units, thresholds, draws=3000):
    """Resample whole units and pool their tokens, in a loop."""
    rng = np.random.default_rng(99)
    members = [np.flatnonzero(units == u) for u in np.unique(units)]
    found = {"ppl": [], "mean_prob": [], "cc": []}
    for _ in range(draws):
        chosen = np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        c, b = (replace(t, nll=t.nll[chosen], entropy=t.entropy[chosen]) for t in (cand, base))
        found["ppl"].append(np.exp(c.nll.mean(dtype=float)) - np.exp(b.nll.mean(dtype=float)))
        found["mean_prob"].append(c.probability.mean() - b.probability.mean())
        found["cc"].append(np.mean([conflicts(t.probability, t.entropy, *thresholds).mean() for t in (c,)]))
        found["cc"][-1] -= conflicts(b.probability, b.entropy, *thresholds).mean()
    return {name: np.percentile(values, [5, 95]) for name, values in found.items()}


@pytest.mark.parametrize("by", ["row", "block"])
def test_intervals_are_those_of_a_bootstrap_in_a_loop(tmp_path, few_blocks, by):
    """Conversations span blocks, and blocks conversations: the two are far from one another."""
    cand, base = conversations(np.random.default_rng(3))
    if by == "block":
        cand, base = replace(cand, row=None), replace(base, row=None)
    pair = saved(tmp_path, cand, base)
    found, model = compare(*pair, *KEY), pair[1].entries[KEY]["model"]
    unit = "conversations" if by == "row" else "blocks"
    assert found.sample == Sample(unit, len(np.unique(getattr(base, by))))
    for name, (low, high) in bootstrap(cand, base, getattr(base, by), (model["p_thr"], model["h_thr"])).items():
        delta = getattr(found, name)
        assert delta.interval[0] < delta.value < delta.interval[1]
        assert delta.interval == pytest.approx((low, high), abs=0.1 * (high - low)), name


def test_conversations_give_wider_intervals_than_tokens_and_other_ones_than_blocks(tmp_path, few_blocks):
    cand, base = conversations(np.random.default_rng(4), count=300)
    pair = saved(tmp_path, cand, base)
    of_rows = compare(*pair, *KEY).ppl.interval
    alone = np.arange(len(base.row), dtype=np.int32)
    pair = saved(tmp_path, replace(cand, row=alone), replace(base, row=alone))
    of_tokens = compare(*pair, *KEY).ppl.interval
    assert of_rows[1] - of_rows[0] > 1.5 * (of_tokens[1] - of_tokens[0])


HELD = 0.03  # standard error of a share of 400 at 90 %, twice


def shares_held(pairs, truth, intervals):
    held = dict.fromkeys(truth, 0)
    for cand, base in pairs:
        for name, (low, high) in intervals(cand, base).items():
            held[name] += low <= truth[name] <= high
    return {name: count / len(pairs) for name, count in held.items()}


def sums_by(unit, tokens):
    return Sums(*(np.bincount(unit, x) for x in (tokens.nll, tokens.probability, tokens.entropy < 0.5)))


@pytest.fixture(scope="module")
def simulated():
    """400 evaluations of 120 conversations, and what is true of endless ones."""
    rng = np.random.default_rng(0)
    pairs = [conversations(rng, count=120) for _ in range(400)]
    cand, base = conversations(rng, count=60_000)
    truth = {
        "ppl": np.exp(cand.nll.mean(dtype=float)) - np.exp(base.nll.mean(dtype=float)),
        "mean_prob": cand.probability.mean() - base.probability.mean(),
        "cc": (cand.entropy < 0.5).mean() - (base.entropy < 0.5).mean(),
    }
    return pairs, truth


def intervals_by(rng, unit_of):
    def intervals(cand, base):
        unit = np.unique(unit_of(base), return_inverse=True)[1]
        return paired_intervals(np.bincount(unit), sums_by(unit, cand), sums_by(unit, base), rng)

    return intervals


def test_90_percent_intervals_hold_the_truth_in_90_percent_of_evaluations(simulated, monkeypatch):
    """Percentiles of 120 skewed units hold a little less: 88 to 90 %."""
    monkeypatch.setattr(resampling, "DRAWS", 500)
    found = shares_held(*simulated, intervals_by(np.random.default_rng(1), lambda t: t.row))
    assert all(0.89 - HELD <= share <= 0.89 + HELD for share in found.values()), found


@pytest.mark.parametrize("level", [0.80, 0.95])
def test_intervals_of_another_level_would_be_found_out(simulated, monkeypatch, level):
    monkeypatch.setattr(resampling, "DRAWS", 500)
    monkeypatch.setattr(resampling, "LEVEL", level)
    found = shares_held(*simulated, intervals_by(np.random.default_rng(1), lambda t: t.row))
    assert not any(0.89 - HELD <= share <= 0.89 + HELD for share in found.values()), found


def test_intervals_over_tokens_would_be_found_out(simulated, monkeypatch):
    monkeypatch.setattr(resampling, "DRAWS", 500)
    found = shares_held(*simulated, intervals_by(np.random.default_rng(1), lambda t: np.arange(len(t.nll))))
    assert found["ppl"] < 0.75 and found["mean_prob"] < 0.75, found


def test_one_conversation_alone_has_no_interval(tmp_path, few_blocks):
    cand, base = conversations(np.random.default_rng(5))
    one = np.zeros(len(base.row), np.int32)
    found = compare(*saved(tmp_path, replace(cand, row=one), replace(base, row=one)), *KEY)
    assert found.sample == Sample("conversations", 1)
    assert found.ppl.interval is found.cc.interval is found.js2d.interval is found.js2d.estimate is None


def test_results_without_tokens_go_by_blocks_and_without_blocks_by_nothing(tmp_path, few_blocks):
    pair = saved(tmp_path, *conversations(np.random.default_rng(6)))
    for r in pair:
        results.tokens_path(r.path).unlink()
    found = compare(*(results.read(r.path) for r in pair), *KEY)
    assert found.binned and found.sample.unit == "blocks" and found.ppl.interval[0] < found.ppl.interval[1]
    assert found.cc.interval is found.js2d.interval is None

    def forget(content):
        del content["schema"], content["meta"]["tokens_sha256"], content["packs"][0]["seq"]["64"]["model"]["blocks"]

    for r in pair:
        edit(r.path, forget)
    found = compare(*(results.read(r.path) for r in pair), *KEY)
    assert found.binned and found.sample is found.ppl.interval is None


def test_units_without_a_kept_token_count_for_nothing():
    rng, kept = np.random.default_rng(0), np.array([3, 0, 5, 0, 4])
    sums = Sums(np.array([3.0, 0, 6, 0, 2]), np.array([1.0, 0, 2, 0, 2]), None)
    found = paired_intervals(kept, sums, replace(sums, nll=2 * sums.nll), rng)
    assert found.keys() == {"ppl", "mean_prob"} and found["mean_prob"] == (0.0, 0.0)
    assert paired_intervals(np.array([3, 0]), sums, sums, rng) == {}


def landscape(rng, count):
    """Cells of both models on 160 x 120 of ``count`` conversations, and whose each token is."""
    lengths = np.maximum(1, rng.lognormal(math.log(100) - 0.32, 0.8, count).astype(int))
    unit = np.repeat(np.arange(count), lengths)
    lean = rng.normal(1.5, 2.0, len(unit)) + rng.normal(0, 0.7, count)[unit]
    worse = 0.95 * (1 + 0.5 * rng.normal(0, 1, count)[unit])

    def cells(lean):
        h = 1 / (1 + np.exp(0.8 * lean + rng.normal(0, 0.8, len(lean))))
        p = 1 / (1 + np.exp(-lean - rng.normal(0, 0.7, len(lean))))
        return np.minimum(p * 160, 159).astype(int) * 120 + np.minimum(h * 120, 119).astype(int)

    return cells(lean - worse + rng.normal(0, 0.4, len(lean))), cells(lean), unit


@pytest.fixture(scope="module")
def true_divergence():
    """From 12 million tokens, whose own bias is below 0.0004 and taken off."""
    rng, tables = np.random.default_rng(1), np.zeros((2, 19_200), int)
    for _ in range(6):
        for table, cells in zip(tables, landscape(rng, 20_000), strict=False):
            table += np.bincount(cells, minlength=19_200)
    whole = js_divergence(*tables)
    half = js_divergence(*(rng.binomial(table, 0.5) for table in tables))
    return 2 * whole - half


def test_the_estimate_is_without_the_bias_of_the_plug_in(true_divergence):
    """Of 300,000 tokens on 160 x 120 cells: the plug-in is off by 0.015, three quarters of the gate's limit."""
    rng, errors = np.random.default_rng(2), []
    for _ in range(6):
        a, b, unit = landscape(rng, 3_000)
        plug_in = js_divergence(np.bincount(a, minlength=19_200), np.bincount(b, minlength=19_200))
        estimate, _ = unbiased(a, b, unit, 0.0, rng)
        assert plug_in - true_divergence > 0.012
        errors.append(estimate - true_divergence)
    assert abs(np.mean(errors)) < 0.0009 and np.max(np.abs(errors)) < 0.002


@pytest.mark.parametrize("count", [12, 300, 1_000, 3_000])
def test_intervals_of_the_divergence_hold_the_truth(true_divergence, count):
    """Of 1, 30, 100 and 300 thousand tokens; far too few of them make it wide, not wrong."""
    rng, held, runs = np.random.default_rng(3), 0, 30
    for _ in range(runs):
        a, b, unit = landscape(rng, count)
        _, (low, high) = unbiased(a, b, unit, swap_floor(a, b, rng), rng)
        held += low <= true_divergence <= high
    assert held >= 0.8 * runs  # 90 % and more; two standard errors of thirty


def test_the_standard_error_of_the_divergence_is_that_of_repeated_evaluations():
    """Few cells, so that nothing but first order is left; conversations of different lengths and leanings."""
    rng = np.random.default_rng(4)

    def draw(count=400):
        unit = np.repeat(np.arange(count), rng.integers(5, 40, count))
        lean = rng.normal(0, 0.5, count)[unit]
        b = np.clip((rng.normal(0, 1, len(unit)) + lean) + 3, 0, 5).astype(int)
        a = np.clip(b + (rng.random(len(unit)) < 0.3 + 0.2 * (lean > 0)), 0, 5)
        return a, b, unit

    estimates, errors = [], []
    for _ in range(200):
        a, b, unit = draw()
        estimates.append(unbiased(a, b, unit, 0.0, rng)[0])
        errors.append(divergence._standard_error(a, b, 6, unit))
    assert np.mean(errors) == pytest.approx(np.std(estimates), rel=0.15)


def test_a_model_does_not_diverge_from_itself():
    rng = np.random.default_rng(5)
    _, b, unit = landscape(rng, 50)
    assert unbiased(b, b, unit, 0.0, rng) == (0.0, (0.0, 0.0))


def test_too_few_conversations_have_no_estimate():
    rng = np.random.default_rng(6)
    assert unbiased(*landscape(rng, 7), 0.0, rng) is None and unbiased(*landscape(rng, 8), 0.0, rng) is not None
