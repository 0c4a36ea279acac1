"""Runs that are killed, and files that say what is not so: each ends in the right numbers or in an error of the library."""

import json
from pathlib import Path

import pytest

from eaftlib.engine import forward
from eaftlib.evaluation import results
from eaftlib.evaluation.evaluate import evaluate

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
