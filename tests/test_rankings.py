"""Rankings, sums and traces are what they say: what was written is read unchanged, and what was spoiled is an error."""

import itertools
import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import world
from faults import rankings as faults
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from eaftlib.engine.weights import Weights
from eaftlib.errors import ParameterError, ResultError, ScoringError
from eaftlib.files import json_text, typed
from eaftlib.pruning import trace_file
from eaftlib.pruning.criteria import expert_sums
from eaftlib.pruning.explore import Explorer
from eaftlib.pruning.keepsets import core_experts, from_ranking
from eaftlib.pruning.ranking import content_sha256, ranking_of, read_ranking, read_sums
from eaftlib.pruning.schema import RankingFile
from eaftlib.pruning.trace import Trace, record
from eaftlib.report import figures
from eaftlib.report.saliency import read_saliencies

ROOT = Path(__file__).parents[1]
few = settings(max_examples=60)


@pytest.fixture
def folder(tmp_path):
    faults.write_valid(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """(content, keep-sets) of a ranking that is as it was written."""
    there = tmp_path_factory.mktemp("valid")
    content = faults.write_valid(there)
    return content, faults.keep_sets(there, content)


# --- what was written is read -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["demo/recovered/ranking.json", "tests/golden/ranking/ranking.json"])
def test_rankings_of_earlier_versions_are_read_unchanged(path):
    assert read_ranking(ROOT / path) == json.loads((ROOT / path).read_text())


def test_sums_and_a_trace_are_read_unchanged(folder):
    content = read_ranking(folder)
    assert read_sums(folder, content).equals(pq.read_table(folder / "saliency.parquet"))
    golden = ROOT / "tests/golden/ranking"
    assert len(read_sums(golden, read_ranking(golden))) == world.LAYERS * world.EXPERTS
    written = faults.made_up_trace()
    assert faults.comparable(vars(Trace.load(folder / "trace.safetensors"))) == faults.comparable(vars(written))


def test_an_array_that_is_not_contiguous_is_saved_as_it_is(tmp_path):
    trace = faults.made_up_trace()
    replace(trace, gate=np.asfortranarray(trace.gate)).save(tmp_path / "t.safetensors")
    np.testing.assert_array_equal(load_file(tmp_path / "t.safetensors")["gate"], trace.gate)


def test_a_trace_of_an_earlier_version_has_no_hash_and_is_read(folder):
    file = folder / "trace.safetensors"
    rewritten(file, lambda arrays, metadata: None)
    assert faults.comparable(vars(Trace.load(file))) == faults.comparable(vars(faults.made_up_trace()))


numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**70), 2**70) | st.just(-0.0)
leaves = st.none() | st.booleans() | numbers | st.text(st.characters(exclude_categories=["Cs"]))
documents = st.dictionaries(st.text("aé☃\n", max_size=3), st.recursive(leaves, st.lists, max_leaves=8), max_size=4)


@few
@given(documents, documents)
def test_the_hash_survives_being_written_and_read(provenance, criteria):
    again = json.loads(json_text({"provenance": provenance, "criteria": criteria}))
    assert content_sha256(**again) == content_sha256(provenance, criteria)


# --- what was spoiled is refused ----------------------------------------------------------------------------------


def ends(cases, run):
    """Outcomes, and the cases that are neither an own error nor what was written."""
    found = [(name, run(case)) for name, case in cases]
    return Counter(o for _, o in found), [(n, o) for n, o in found if o in (faults.FOREIGN, faults.WRONG)]


@pytest.mark.parametrize("kind", ["named", "named, sealed", "edited"])
def test_no_named_change_of_a_ranking_is_accepted(folder, valid, kind):
    cases = [(name, make) for of, name, make in faults.ranking_cases(valid[0]) if of == kind]
    counts, bad = ends(cases, lambda make: faults.ranking_outcome(folder, make(), valid[1]))
    assert not bad and counts == {faults.OWN: len(cases)} and len(cases) >= 9


@pytest.mark.parametrize(
    "kind, every", [("anywhere", 17), ("anywhere, sealed", 13), ("anywhere, no JSON", 29), ("bytes", 2)]
)
def test_a_change_anywhere_is_refused_or_changes_no_keep_set(folder, valid, kind, every):
    cases = [(name, make) for of, name, make in faults.ranking_cases(valid[0]) if of == kind][::every]
    counts, bad = ends(cases, lambda make: faults.ranking_outcome(folder, make(), valid[1]))
    assert not bad and counts[faults.OWN] > 70


def test_the_untouched_is_told_from_the_spoiled(folder, valid):
    """The harness sees a wrong keep-set, and a foreign error."""
    text = json.dumps(valid[0])
    assert faults.ranking_outcome(folder, text, valid[1]) == faults.RIGHT
    assert faults.ranking_outcome(folder, text, valid[1] | {("ean", 4): None}) == faults.WRONG
    assert faults.outcome(lambda: {}["x"], {}) == faults.FOREIGN


MESSAGES = [
    ("id 32", r"criteria\.reap\.ranking: layer 1: found expert 32, expected ids from 0 to 7"),
    ("an id twice", r"criteria\.reap\.ranking: layer 1: expert \d is there twice"),
    ("a layer less", "ranking|scores: found 2 layers of .8. experts, expected 3 of 8"),
    ("layers permuted", r"criteria\.reap\.ranking: layer 0: the scores give another order"),
    ("a keep-set with id 8", r"criteria\.recon\.keep_sets\.4: layer 0: expected 4 different ids below 8, ascending"),
    ("a keep-set less", r"criteria\.recon\.keep_sets: found counts .*, expected .*'4'.*: from top_k"),
    ("rows edited", r"was changed after it was written: the SHA-256 .* run 01_rank"),
    ("an earlier model", r"provenance\.model_sha256: .*found 'ab12'"),
]


@pytest.mark.parametrize("name, message", MESSAGES)
def test_an_error_names_file_field_and_layer(folder, valid, name, message):
    make = next(make for kind, n, make in faults.ranking_cases(valid[0]) if n == name and "sealed" not in kind)
    (folder / "ranking.json").write_text(make())
    with pytest.raises(ResultError, match=rf"ranking\.json.*({message})"):
        read_ranking(folder)
    with pytest.raises(ResultError, match=message):
        read_saliencies([folder])


@pytest.mark.parametrize("name", ["num_layers", "num_experts", "top_k"])
def test_a_ranking_of_a_model_of_another_shape_is_refused_by_name(folder, valid, name):
    model = SimpleNamespace(**vars(faults.MODEL) | {name: 24, "sha256": valid[0]["provenance"]["model_sha256"]})
    with pytest.raises(ResultError, match=rf"{name} is {valid[0][name]}; m has 24\. .* run 01_rank"):
        from_ranking(model, ranking=folder, criterion="reap", keep_n=4)


@pytest.mark.parametrize("name", ["ranking.json", "."])
def test_a_folder_or_a_fifo_is_no_ranking(tmp_path, name):
    (tmp_path / "ranking.json").mkdir() if name == "ranking.json" else os.mkfifo(tmp_path / "ranking.json")
    with pytest.raises(ResultError, match=r"ranking\.json is no file"):
        read_ranking(tmp_path)


SCORES = st.lists(st.sampled_from([None, -1.0, -0.0, 0.0, 0.5, 2.0]), min_size=1, max_size=5)


@st.composite
def ranked(draw):
    """(criterion, scores [E], an order that may or may not be theirs)"""
    criterion = draw(st.sampled_from(["ean", "eaft_reap", "eaft_reap_mean"]))
    scores = draw(SCORES)
    if criterion != "eaft_reap_mean":
        scores = [0.0 if s is None else s for s in scores]
    if criterion == "ean":
        scores = [abs(s) for s in scores]
    if draw(st.booleans()):
        return criterion, scores, draw(st.permutations(range(len(scores))))
    return criterion, scores, draw(st.sampled_from(sorted(orders(criterion, scores))))


def orders(criterion, scores):
    """Every order that the rule allows: best first, those never routed to last (only means say who), equal ones by id."""
    ids = range(len(scores))
    if criterion == "eaft_reap_mean":
        never = [{i for i in ids if scores[i] is None}]
    else:
        zero = [i for i in ids if scores[i] == 0]
        never = [set(some) for n in range(len(zero) + 1) for some in itertools.combinations(zero, n)]
    return {tuple(sorted(ids, key=lambda i: (i in last, -(scores[i] or 0.0), i))) for last in never}


@settings(max_examples=150)
@given(ranked())
def test_an_order_is_accepted_where_the_scores_can_give_it(case):
    criterion, scores, order = case
    entries = {criterion: {"scores": [scores], "ranking": [list(order)]}}
    content = world.hand_made_ranking(entries, num_layers=1, num_experts=len(scores), top_k=1)
    if tuple(order) in orders(criterion, scores):
        typed(content, RankingFile, "x", ResultError, "again")
    else:
        with pytest.raises(ResultError, match="layer 0: the scores give another order"):
            typed(content, RankingFile, "x", ResultError, "again")


# --- saliency.parquet ---------------------------------------------------------------------------------------------


def test_no_spoiled_table_is_accepted(folder, valid):
    written = pq.read_table(folder / "saliency.parquet").to_pydict()

    def run(case):
        table, sealed = case
        pq.write_table(table, folder / "saliency.parquet")
        content = faults.sealed_with(valid[0], table) if sealed else valid[0]
        return faults.table_outcome(folder, content, written)

    cases = [(name, (table, sealed)) for name, table, sealed in faults.table_cases(folder)]
    counts, bad = ends(cases, run)
    assert not bad and counts == {faults.OWN: len(cases)}


def test_a_flipped_byte_of_a_table_is_an_error_or_changes_nothing(folder, valid):
    file = folder / "saliency.parquet"
    written, data = pq.read_table(file).to_pydict(), file.read_bytes()

    def run(case):
        file.write_bytes(case)
        return faults.table_outcome(folder, valid[0], written)

    counts, bad = ends(faults.byte_cases(data, 300), run)
    assert not bad and counts[faults.OWN] > 150


def test_a_table_that_cannot_be_read_is_named(folder, valid):
    (folder / "saliency.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(ResultError, match=r"saliency\.parquet cannot be read .* run 01_rank"):
        read_sums(folder, valid[0])


# --- trace.safetensors --------------------------------------------------------------------------------------------


def rewritten(file, change):
    """The trace in ``file`` with arrays and metadata changed; ``sha256`` is left out, as in a trace of earlier versions."""
    arrays, metadata = trace_file._read(file)
    metadata.pop("sha256")
    change(arrays, metadata)
    save_file(arrays, file, metadata)


def test_a_flipped_byte_of_a_trace_is_an_error(folder):
    file = folder / "trace.safetensors"
    written, data = faults.comparable(vars(Trace.load(file))), file.read_bytes()

    def run(case):
        file.write_bytes(case)
        return faults.trace_outcome(file, written)

    cases = list(faults.byte_cases(data, 300))
    counts, bad = ends(cases, run)
    assert not bad and counts == {faults.OWN: len(cases)}


def _float64(arrays, metadata):
    arrays["nll"] = arrays["nll"].astype(np.float64)


SPOILED = {
    "missing": (lambda a, m: a.pop("peak"), "peak: missing"),
    "half a sample": (lambda a, m: a.pop("grams"), "grams: missing"),
    "more": (lambda a, m: a.update(more=a["nll"]), "more: no part of a trace"),
    "float64": (_float64, "nll: found F64, expected F32"),
    "expert as float": (lambda a, m: a.update(expert=a["gate"]), "expert: found F32, expected U8 or I32"),
    "shape": (lambda a, m: a.update(gate=a["gate"][:, :-1].copy()), r"gate: found shape \[3, 59, 2\], expected \[3, 60, 2\]"),
    "two dimensions": (lambda a, m: a.update(expert=a["expert"][0].copy()), r"expert: found \[60, 2\], expected layers"),
    "tokens": (lambda a, m: a.update(nll=a["nll"][1:].copy()), r"nll: found shape \[49\], expected \[50\]"),
    "sample": (lambda a, m: a.update(grams=a["grams"][:, 1:].copy()), r"grams: found shape \[3, 8, 36\], expected"),
    "id": (lambda a, m: a["expert"].__setitem__((0, 0, 0), 8), "expert: found values from 0 to 8, expected 0 to 7"),
    "row": (lambda a, m: a["token_row"].__setitem__(3, 60), "token_row: found values from 1 to 60, expected 0 to 59"),
    "row -1": (lambda a, m: a["predictor_row"].__setitem__(3, -1), "predictor_row: found values from -1"),
    "NaN": (lambda a, m: a["nll"].__setitem__(3, np.nan), "nll: found values from nan"),
    "norm": (lambda a, m: a["norm"].__setitem__((0, 0, 0), -1), "norm: found values from -1"),
    "gate": (lambda a, m: a["gate"].__setitem__((0, 0, 0), 1.5), "gate: found values from .* to 1.5, expected 0"),
    "entropy": (lambda a, m: a["entropy"].__setitem__(0, 1.5), "entropy: found values"),
    "no experts": (lambda a, m: m.pop("num_experts"), "metadata: found no num_experts"),
    "experts": (lambda a, m: m.update(num_experts="8.5"), "metadata: found no num_experts"),
    "fewer experts": (lambda a, m: m.update(num_experts="7"), "expert: found values|grams: found shape"),
    "no JSON": (lambda a, m: m.update(provenance='{"a'), "metadata: found no num_experts or no provenance"),
    "deep": (lambda a, m: m.update(provenance="[" * 100_000), "metadata: found no num_experts or no provenance"),
    "a list": (lambda a, m: m.update(provenance="[]"), "provenance: the file: Input should be"),
    "no model": (lambda a, m: m.update(provenance="{}"), "provenance: model_id: Field required"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED)
def test_a_trace_that_contradicts_itself_is_refused_whatever_its_hash(folder, name):
    change, message = SPOILED[name]
    rewritten(folder / "trace.safetensors", change)
    with pytest.raises(ResultError, match=rf"trace\.safetensors: ({message}).*run 01_rank"):
        Trace.load(folder / "trace.safetensors")


def test_a_trace_that_is_cut_while_it_is_read_is_an_error(folder, monkeypatch):
    file, header = folder / "trace.safetensors", trace_file._header

    def cut_after(path):
        found = header(path)
        os.truncate(path, 3000)
        return found

    monkeypatch.setattr(trace_file, "_header", cut_after)
    with pytest.raises(ResultError, match=r"trace\.safetensors is cut short"):
        Trace.load(file)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: None])
def test_a_trace_that_is_no_file_is_named(tmp_path, make):
    make(tmp_path / "trace.safetensors")
    with pytest.raises(ResultError, match=r"trace\.safetensors (is no file|does not exist).*run 01_rank"):
        Trace.load(tmp_path / "trace.safetensors")


def test_a_trace_is_explored_with_its_own_ranking_alone(valid):
    trace = faults.made_up_trace()
    Explorer(trace, valid[0])
    other = replace(trace, provenance=trace.provenance | {"rows": "eval"})
    with pytest.raises(ResultError, match="rows is 'calib' there, 'eval' in the trace"):
        Explorer(other, valid[0])
    with pytest.raises(ResultError, match="top_k is 3 there, 2 in the trace"):
        Explorer(trace, valid[0] | {"top_k": 3})


# --- before the hours ---------------------------------------------------------------------------------------------


@pytest.fixture
def no_weights(monkeypatch):
    """Whatever reads a weight fails the test."""
    monkeypatch.setattr(Weights, "__init__", lambda *a, **k: pytest.fail("a weight was read"))


def test_an_out_dir_that_cannot_be_written_is_found_before_a_weight_is_read(
    checkpoint, blocks, cpu, tmp_path, no_weights
):
    (tmp_path / "file").write_text("here")
    for out_dir in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300), Path("/proc/none")):
        with pytest.raises(ParameterError, match=r"is no folder that can be written to .*; choose another one"):
            record(checkpoint, blocks, cpu, out_dir=out_dir, progress=False)
    assert (tmp_path / "file").read_text() == "here"


def test_a_block_beyond_the_context_is_found_before_a_weight_is_read(checkpoint, blocks, cpu, no_weights):
    longer = replace(blocks, tokens=np.zeros((1, 1025), int), kept=np.ones((1, 1025), bool))
    with pytest.raises(ParameterError, match="found 1025, expected 2 to 1024, the model's longest context"):
        record(checkpoint, longer, cpu, progress=False)


def test_when_recon_fails_the_trace_is_there(checkpoint, blocks, cpu, tmp_path, monkeypatch):
    """All other criteria can be had from it, without the model."""
    trace, _ = record(checkpoint, blocks, cpu, recon_tokens=5, out_dir=tmp_path, progress=False)
    trace.grams[0] = np.inf
    trace.save(tmp_path / "trace.safetensors")
    sums = expert_sums(trace, np.ones(len(trace.nll)))
    with pytest.raises(ScoringError, match="recon: an expert's output is NaN"):
        ranking_of(trace, sums, ["reap", "recon"], settings=world.RANK_SETTINGS, progress=False)
    again = Trace.load(tmp_path / "trace.safetensors")
    found = ranking_of(again, expert_sums(again, np.ones(len(again.nll))), ["reap"], settings=world.RANK_SETTINGS)
    assert found["criteria"] == ranking_of(trace, sums, ["reap"], settings=world.RANK_SETTINGS)["criteria"]


def test_sums_that_are_not_finite_are_no_ranking():
    trace = faults.made_up_trace()
    trace.norm[0, 0, 0] = np.inf
    sums = expert_sums(trace, np.ones(faults.TOKENS))
    with pytest.raises(ScoringError, match="norm_sum: an expert's output is NaN, Inf or overflows"):
        ranking_of(trace, sums, ["reap"], settings=world.RANK_SETTINGS)


def test_a_core_needs_tokens_that_weigh_something():
    sums = expert_sums(faults.made_up_trace(), np.zeros(faults.TOKENS))
    with pytest.raises(ParameterError, match="core_top_m: found 2, but no token of the ranking weighs more than 0"):
        core_experts(sums, 2)
    assert not core_experts(sums, 0).any()


def test_random_needs_a_seed_that_it_can_take():
    trace = faults.made_up_trace()
    sums = expert_sums(trace, np.ones(faults.TOKENS))
    with pytest.raises(ParameterError, match="seed: found -1, expected 0 or more"):
        ranking_of(trace, sums, ["random"], settings=world.RANK_SETTINGS, seed=-1)


@pytest.mark.parametrize("scores", [-np.ones((2, 4)), np.zeros((2, 4)), np.eye(2, 4)])
def test_scores_of_which_none_is_positive_are_drawn(scores):
    assert len(figures.saliency_map(scores, "eaft_reap", 2)._repr_png_()) > 1000
    assert len(figures.mass_concentration({"eaft_reap": scores})._repr_png_()) > 1000
