"""Runs that are killed, and files that say what is not so: each ends in the right numbers or in an error of the library."""

import json
from pathlib import Path

import numpy as np
import pytest
from faults import result_files
from faults.result_files import CANNOT_BE_KNOWN, OWN, RIGHT, entry_of
from hypothesis import given, settings
from hypothesis import strategies as st

from eaftlib.engine import forward
from eaftlib.evaluation import reconcile, results
from eaftlib.evaluation.evaluate import evaluate
from eaftlib.evaluation.statistics import aggregate

SETTINGS = {"only": ["UNION"], "seq_lens": [24], "num_blocks": 3, "progress": False}


class Killed(BaseException):
    """What no handler is for."""


@pytest.fixture
def renames(monkeypatch):
    """Renames that are made; the one of number ``renames.fatal`` is not, since the process is killed before it."""
    rename, made = Path.replace, type("Renames", (list,), {"fatal": None})()

    def counted(old, new):
        if len(made) == made.fatal:
            raise Killed
        made.append(Path(new).name)
        return rename(old, new)

    monkeypatch.setattr(Path, "replace", counted)
    return made


@pytest.fixture
def run(checkpoint, source, cpu, tmp_path):
    """Evaluate the tiny model as ``x`` into a folder; returns the bytes of the two files."""

    def once(**changes):
        (path,) = evaluate(checkpoint, source, cpu, {"x": None}, out_dir=tmp_path, **SETTINGS | changes)
        return path.read_bytes(), results.tokens_path(path).read_bytes()

    return once


def numbers(content):
    """What a result's bytes say, but for how fast it was made and with which file."""
    found = json.loads(content)
    del found["meta"]["tokens_sha256"]
    for pack in found["packs"]:
        for entry in pack["seq"].values():
            del entry["model"]["tok_s_pred"]
    return found


def killed_at(renames, number, work):
    renames.clear()
    renames.fatal = number
    with pytest.raises(Killed):
        work()
    renames.fatal = None


@pytest.mark.parametrize("number", range(4))
def test_a_result_that_was_set_aside_stays_whole_wherever_the_next_run_is_killed(run, renames, tmp_path, number):
    """The renames: the former tokens, the former JSON, the new tokens, the new JSON."""
    before = run()
    killed_at(renames, number, lambda: run(entropy_topk=10))
    after = run(entropy_topk=10)
    kept = tuple((tmp_path / f"x.{name}.old").read_bytes() for name in ("json", "tokens.parquet"))
    assert kept == before
    assert numbers(after[0])["meta"]["entropy_topk"] == 10
    assert results.read(tmp_path / "x.json").tokens("UNION", 24) is not None


def test_an_order_of_renames_that_is_assumed_here(run, renames):
    run()
    renames.clear()
    run(entropy_topk=10)
    assert renames == ["x.tokens.parquet.old", "x.json.old", "x.tokens.parquet", "x.json"]


def test_what_is_finished_is_put_right_where_a_kill_left_tokens_of_more(run, renames, tmp_path, monkeypatch):
    """Killed before the second JSON; then only the length that is finished is asked for."""
    first = run()
    killed_at(renames, 1, lambda: run(seq_lens=[24, 40]))
    assert not results.belong_together(tmp_path / "x.json")
    monkeypatch.setattr(forward, "score", lambda *a, **k: pytest.fail("it is finished"))
    again = run()
    assert numbers(again[0])["packs"] == numbers(first[0])["packs"] and again[1] == first[1]
    assert results.read(tmp_path / "x.json").tokens("UNION", 24) is not None


def test_a_run_that_is_killed_before_the_second_json_goes_on(run, renames, tmp_path):
    run()
    killed_at(renames, 1, lambda: run(seq_lens=[24, 40]))
    run(seq_lens=[24, 40])
    found = results.read(tmp_path / "x.json")
    assert set(found.entries) == {("UNION", 24), ("UNION", 40)}
    assert all(found.tokens(*key) is not None for key in found.entries)


@pytest.fixture(scope="module")
def made():
    return result_files.made()


def found_in(tmp_path, made, change):
    """(what became of a report on the files after the change, why), in this process."""
    files, expected = made
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    change(tmp_path)
    return result_files.outcome(tmp_path, expected[any(tmp_path.glob("*.tokens.parquet"))])


def named(group):
    """Cases of a group by name; every n-th where there are many."""
    cases = [case for case in result_files.cases() if case.group == group and case.name not in CANNOT_BE_KNOWN]
    few = cases[:: max(1, len(cases) // MOST)]
    return pytest.mark.parametrize(
        "change", [c.change for c in few], ids=[c.name.encode("unicode_escape") for c in few]
    )


MOST = 45


@named("copied from the base")
def test_numbers_of_another_model_are_found_out_by_the_tokens(tmp_path, made, change):
    """Thresholds and conflicts are the same: the candidate's order of tokens is the base's."""
    assert found_in(tmp_path, made, change)[0] in (OWN, RIGHT)


@named("packs and settings")
def test_what_is_told_twice_or_not_at_all_is_refused_or_incomplete(tmp_path, made, change):
    assert found_in(tmp_path, made, change)[0] in (OWN, RIGHT)


@named("columns of the token file")
def test_a_token_file_of_other_columns_or_values_is_refused_although_its_hash_agrees(tmp_path, made, change):
    assert found_in(tmp_path, made, change)[0] in (OWN, RIGHT)


@named("what lies in the folder")
def test_what_is_no_file_is_refused_or_passed_over(tmp_path, made, change):
    assert found_in(tmp_path, made, change)[0] in (OWN, RIGHT)


@named("bytes of the token file, its hash renewed")
def test_a_token_file_with_a_damaged_byte_is_refused_or_right(tmp_path, made, change):
    assert found_in(tmp_path, made, change)[0] in (OWN, RIGHT)


@named("bytes of the JSON")
def test_a_json_with_a_damaged_byte_is_refused_or_right(tmp_path, made, change):
    assert found_in(tmp_path, made, change)[0] in (OWN, RIGHT)


@named("a field of the JSON")
def test_another_value_in_any_field_is_refused_or_right(tmp_path, made, change):
    assert found_in(tmp_path, made, change)[0] in (OWN, RIGHT)


def test_the_harness_would_see_a_report_that_believes_what_it_reads(tmp_path, made, monkeypatch):
    """Without the checks a candidate that fails passes, with its numbers copied from the base."""
    names = ["ppl", "mean_nll", "mean_prob", "hist2d_x_H", "hist1d_x", "hist1d_H"]
    change = result_files.edited(lambda mine, other: [entry_of(mine).update({n: entry_of(other)[n]}) for n in names])
    assert found_in(tmp_path, made, change)[0] == OWN
    monkeypatch.setattr(results, "_require_agreement", lambda *a: None)
    assert found_in(tmp_path, made, change)[0] == result_files.WRONG


NUMBERS = ("ppl", "mean_nll", "mean_prob", "mean_entropy", "p_thr", "h_thr", "cc_rate", "cc_count", "var_nll")


@given(st.sampled_from(NUMBERS), st.floats(-3, 3).filter(lambda x: abs(x) > 1e-6))
@settings(max_examples=25, derandomize=True, deadline=None)
def test_an_aggregate_that_is_off_by_a_millionth_is_found_by_its_tokens(name, by):
    """Counts by one."""
    tokens = result_files.tokens_of(1.0)
    model = aggregate(tokens, 8, 0.15)
    assert not list(reconcile.with_tokens(model, tokens, 8, 0.15)) and not list(reconcile.with_itself(model, 8, 0.15))
    model[name] += by if isinstance(model[name], float) else (1 if by > 0 else -1)
    found = [*reconcile.with_itself(model, 8, 0.15), *reconcile.with_tokens(model, tokens, 8, 0.15)]
    assert name in {wrong.field for wrong in found} or (name == "cc_rate" and found)


def test_a_count_may_differ_by_tokens_at_an_edge_and_by_no_other():
    """Two tokens' p lies on the threshold: with another last bit of exp they are above it."""
    tokens = result_files.tokens_of(1.0)
    model = aggregate(tokens, 8, 0.15)
    at = int(np.argmin(np.where(tokens.entropy <= model["h_thr"], np.abs(tokens.probability - model["p_thr"]), 9.0)))
    for off, allowed in ((1e-13, True), (1e-7, False)):
        moved = model | {"p_thr": float(tokens.probability[at]) - off}
        found = {wrong.field for wrong in reconcile._counts(moved, model, tokens)}
        counted = int(
            np.sum((tokens.probability <= moved["p_thr"] + 1e-9 * allowed) & (tokens.entropy <= model["h_thr"]))
        )
        assert ("cc_count" in found) == (counted != model["cc_count"])
