"""From rankings to keep-sets: counts, policies, refusals, and the real profile of gpt-oss-20b."""

import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import world
from hypothesis import assume, given
from hypothesis import strategies as st

from eaftlib.errors import EaftError, ParameterError, ResultError
from eaftlib.model.checkpoint import Checkpoint
from eaftlib.pruning import keepsets
from eaftlib.pruning.criteria import (
    RegionWeights,
    criterion_scores,
    expert_sums,
    rank_experts,
    sums_by_layer,
    token_weights,
)
from eaftlib.pruning.keepsets import choose, core_experts, from_ranking, keep_count, super_experts
from eaftlib.pruning.ranking import ranking_of, write_ranking
from eaftlib.pruning.trace import record

REFERENCE = Path(__file__).parents[2] / "shared" / "reference"


@pytest.mark.parametrize(
    "given_, expected",
    [
        ({"keep_n": 16}, 16),
        ({"keep_n": 17}, 20),
        ({"keep_n": 17, "multiple_of": 1}, 17),
        ({"keep_n": 29, "multiple_of": 8}, 32),
        ({"keep_frac": 0.5}, 16),
        ({"keep_frac": 0.51}, 20),
        ({"keep_frac": 0.75}, 24),
        ({"keep_frac": 1}, 32),
        ({"keep_frac": 0.7, "multiple_of": 1}, 23),
    ],
)
def test_counts_of_32_experts(given_, expected):
    assert keep_count(32, 4, **given_) == expected


@given(st.integers(4, 130), st.integers(1, 100), st.integers(1, 9))
def test_a_share_is_rounded_up_once(num_experts, percent, multiple_of):
    exact = math.ceil(Fraction(percent, 100) * num_experts)
    assume(exact >= 4)
    expected = min(-(-exact // multiple_of) * multiple_of, num_experts)
    assert keep_count(num_experts, 4, keep_frac=percent / 100, multiple_of=multiple_of) == expected


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"keep_n": 0}, ["keep_n", "found 0", "top_k = 4"]),
        ({"keep_n": -4}, ["keep_n", "found -4"]),
        ({"keep_n": 3}, ["keep_n", "found 3", "top_k = 4"]),
        ({"keep_n": 33}, ["keep_n", "found 33", "num_experts = 32"]),
        ({"keep_frac": 0.0}, ["keep_frac", "found 0.0"]),
        ({"keep_frac": 1.01}, ["keep_frac", "found 1.01"]),
        ({"keep_frac": float("nan")}, ["keep_frac", "nan"]),
        ({}, ["exactly one of keep_n and keep_frac"]),
        ({"keep_n": 16, "keep_frac": 0.5}, ["exactly one of keep_n and keep_frac", "keep_n=16"]),
        ({"keep_n": 16, "multiple_of": 0}, ["multiple_of", "found 0"]),
    ],
)
def test_impossible_counts_are_refused(arguments, words):
    with pytest.raises(ParameterError) as error:
        keep_count(32, 4, **arguments)
    assert all(word in str(error.value) for word in words)


@st.composite
def choices(draw):
    experts = draw(st.integers(1, 12))
    layers = draw(st.integers(1, 4))
    keep_n = draw(st.integers(1, experts))
    ranking = [draw(st.permutations(range(experts))) for _ in range(layers)]
    core = [draw(st.sets(st.integers(0, experts - 1), max_size=keep_n)) for _ in range(layers)]
    return experts, keep_n, ranking, core


@given(choices())
def test_a_keep_set_has_its_size_its_core_and_otherwise_the_best(case):
    experts, keep_n, ranking, core = case
    mask = np.array([[e in layer for e in range(experts)] for layer in core])
    for order, required, ids in zip(ranking, core, choose(np.array(ranking), keep_n, mask).tolist(), strict=True):
        assert ids == sorted(set(ids)) and len(ids) == keep_n
        assert required <= set(ids)
        optional = [e for e in order if e not in required]
        assert set(ids) - required == set(optional[: keep_n - len(required)])


@given(choices())
def test_without_a_core_the_best_stay(case):
    _, keep_n, ranking, _ = case
    assert choose(np.array(ranking), keep_n).tolist() == [sorted(order[:keep_n]) for order in ranking]


def test_a_core_larger_than_the_keep_set_is_refused():
    with pytest.raises(ParameterError, match="layer 1: 3 experts must always stay, but keep_n is 2"):
        choose(np.array([[0, 1, 2]] * 2), 2, np.array([[True, False, False], [True, True, True]]))


def test_mask_marks_the_kept_ids():
    keep = keepsets.KeepSet(np.array([[0, 3], [1, 2]]), 4, {})
    assert keep.mask.tolist() == [[True, False, False, True], [False, True, True, False]] and keep.keep_n == 2


def sums(**columns):
    """A table of one value per [layer, expert]."""
    values = {name: np.asarray(v) for name, v in columns.items()}
    layers, experts = next(iter(values.values())).shape
    ids = {"layer": np.repeat(np.arange(layers), experts), "expert": np.tile(np.arange(experts), layers)}
    return pa.table(ids | {name: v.ravel() for name, v in values.items()})


def test_core_experts_have_the_largest_positive_mass():
    table = sums(pos_gate_norm_sum=[[1.0, 5.0, 3.0, 3.0], [0.0, 0.0, 2.0, 1.0]])
    assert core_experts(table, 2).tolist() == [[False, True, True, False], [False, False, True, True]]
    assert not core_experts(table, 0).any()
    with pytest.raises(ParameterError, match="core_top_m: found 5"):
        core_experts(table, 5)


def test_super_experts_are_outliers_of_the_first_three_quarters():
    peak = np.ones((8, 128))
    peak[0, 3], peak[5, 7], peak[6, 1] = 900.0, 1000.0, 2000.0  # layer 6 of 8 lies in the last quarter
    peak[2, 2] = 150.0  # above the percentile, not above a tenth of the maximum
    assert np.argwhere(super_experts(sums(max_activation=peak))).tolist() == [[0, 3], [5, 7]]


@pytest.fixture(scope="module")
def ranking_folder(tmp_path_factory, checkpoint, blocks, cpu):
    folder = tmp_path_factory.mktemp("ranking")
    trace, _ = record(checkpoint, blocks, cpu, progress=False)
    weights = token_weights(trace, 0.15, RegionWeights())
    table = expert_sums(trace, weights)
    write_ranking(folder, ranking_of(trace, table, ["reap", "eaft_reap"], settings=world.RANK_SETTINGS), table)
    return folder


def best(folder, criterion, keep_n, core=0):
    """The keep-set worked out from the files with plain Python."""
    content = json.loads((folder / "ranking.json").read_text())
    table = pq.read_table(folder / "saliency.parquet").to_pylist()
    kept = []
    for layer, order in enumerate(content["criteria"][criterion]["ranking"]):
        mass = {r["expert"]: r["pos_gate_norm_sum"] for r in table if r["layer"] == layer}
        required = sorted(mass, key=lambda e: (-mass[e], e))[:core]
        kept.append(sorted((required + [e for e in order if e not in required])[:keep_n]))
    return kept


@pytest.mark.parametrize("criterion", ["reap", "eaft_reap"])
@pytest.mark.parametrize("core", [0, 3])
def test_keep_set_of_a_ranking_file(checkpoint, ranking_folder, criterion, core):
    keep = from_ranking(checkpoint, ranking=ranking_folder, criterion=criterion, keep_n=4, core_top_m=core)
    assert keep.ids.tolist() == best(ranking_folder, criterion, 4, core)
    same = from_ranking(
        checkpoint, ranking=str(ranking_folder / "ranking.json"), criterion=criterion, keep_frac=0.5, core_top_m=core
    )
    assert same.ids.tolist() == keep.ids.tolist()


def test_a_keep_set_says_how_it_was_chosen(checkpoint, ranking_folder, blocks):
    keep = from_ranking(checkpoint, ranking=ranking_folder, criterion="reap", keep_n=5, core_top_m=1)
    provenance = json.loads((ranking_folder / "ranking.json").read_text())["provenance"]
    assert keep.chosen_by == {
        "criterion": "reap",
        "keep_n": 8,
        "core_top_m": 1,
        "keep_super": False,
        "ranking_sha256": provenance["sha256"],
        "ranking_rows": "all",
        "ranking_rows_sha256": blocks.rows_sha256,
    }


def test_the_ranking_of_another_model_is_refused(tmp_path, ranking_folder):
    other = Checkpoint(str(world.write_checkpoint(tmp_path / "other", world.state_dict(seed=1))))
    with pytest.raises(ResultError, match=r"was made from .*tiny-gpt-oss .*, not from .*other"):
        from_ranking(other, ranking=ranking_folder, criterion="reap", keep_n=4)


def test_the_ranking_of_a_model_with_other_experts_is_refused(tmp_path, ranking_folder):
    """The routers are the same: they choose among experts that have changed places."""
    state = world.state_dict()
    for kind in ("blocks", "scales", "bias"):
        name = f"model.layers.2.mlp.experts.gate_up_proj_{kind}"
        state[name] = state[name][torch.tensor([1, 0, *range(2, world.EXPERTS)])]
    other = Checkpoint(str(world.write_checkpoint(tmp_path / "other", state)))
    with pytest.raises(ResultError, match=r"was made from .*tiny-gpt-oss .*, not from .*other .* Run 01_rank"):
        from_ranking(other, ranking=ranking_folder, criterion="reap", keep_n=4)


def test_unknown_criterion_names_those_there_are(checkpoint, ranking_folder):
    with pytest.raises(ParameterError, match=r"criterion: found 'ean'; .* has \['eaft_reap', 'reap'\]"):
        from_ranking(checkpoint, ranking=ranking_folder, criterion="ean", keep_n=4)


@pytest.mark.parametrize("count", [{"keep_n": 0}, {"keep_n": 1}, {"keep_n": 9}])
def test_impossible_counts_of_this_model_are_refused(checkpoint, ranking_folder, count):
    with pytest.raises(ParameterError, match=rf"keep_n: found {count['keep_n']}; .*top_k = 2.*num_experts = 8"):
        from_ranking(checkpoint, ranking=ranking_folder, criterion="reap", **count)


@pytest.mark.parametrize(
    "text, words", [("{}", "schema: Field required"), ('{"schema": "x/1"}', "found 'x/1'"), ('{"sch', "ranking.json")]
)
def test_a_file_that_is_no_ranking_is_refused(checkpoint, tmp_path, text, words):
    (tmp_path / "ranking.json").write_text(text)
    with pytest.raises(ResultError, match=words):
        from_ranking(checkpoint, ranking=tmp_path, criterion="reap", keep_n=4)


def test_a_missing_ranking_or_saliency_file_is_named(checkpoint, tmp_path, ranking_folder):
    with pytest.raises(ResultError, match=r"ranking\.json does not exist; run 01_rank"):
        from_ranking(checkpoint, ranking=tmp_path, criterion="reap", keep_n=4)
    (tmp_path / "ranking.json").write_text((ranking_folder / "ranking.json").read_text())
    with pytest.raises(EaftError, match=r"saliency\.parquet"):
        from_ranking(checkpoint, ranking=tmp_path, criterion="reap", keep_n=4, core_top_m=1)


@pytest.fixture(scope="module")
def profile():
    if not REFERENCE.is_dir():
        pytest.skip(f"the real gpt-oss-20b profile is not at {REFERENCE}")
    return pq.read_table(REFERENCE / "20b_reap_saliency.parquet")


def real_sums(profile, layer, key):
    rows = [r for r in profile.to_pylist() if r["layer"] == layer]
    return [key(r) for r in sorted(rows, key=lambda r: r["expert"])]


@pytest.mark.parametrize("criterion, column", [("reap", "saliency_mean"), ("ean_mean", "norm_mean")])
def test_means_of_the_real_profile_are_its_own(profile, criterion, column):
    scores = criterion_scores(profile, criterion)
    stored = profile[column].to_numpy().reshape(24, 32)
    routed = profile["count"].to_numpy().reshape(24, 32) > 0
    np.testing.assert_allclose(scores[routed], stored[routed], rtol=1e-9)
    assert np.isnan(scores[~routed]).all()


@pytest.mark.parametrize("keep_n", [24, 16])
def test_reap_keeps_what_the_published_ranking_of_the_real_model_keeps(profile, keep_n):
    published = json.loads((REFERENCE / "20b_reap_saliency_ranking_by_layer.json").read_text())
    routed = sums_by_layer(profile)["count"] > 0
    ids = choose(rank_experts(criterion_scores(profile, "reap"), routed), keep_n)
    assert ids.tolist() == [sorted(order[:keep_n]) for order in published]


@pytest.mark.parametrize("keep_n", [24, 16])
@pytest.mark.parametrize("criterion, column", [("frequency", "count"), ("gate_mass", "gate_sum"), ("ean", "norm_sum")])
def test_policies_on_the_real_profile_equal_sorting_its_rows(profile, keep_n, criterion, column):
    routed = sums_by_layer(profile)["count"] > 0
    ids = choose(rank_experts(criterion_scores(profile, criterion), routed), keep_n).tolist()
    for layer in range(24):
        value = real_sums(profile, layer, lambda r: r[column])
        assert ids[layer] == sorted(sorted(range(32), key=lambda e: (-value[e], e))[:keep_n])
