"""Result files: written whole or not at all, read with every damage named."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from eaftlib.errors import ResultError
from eaftlib.evaluation import results
from eaftlib.evaluation.statistics import Tokens, aggregate

META = {"tokenizer_sha256": "t0", "num_blocks": 8, "entropy_topk": 20, "cc_quantile": 0.15, "rows": "eval"}
META |= {"model_sha256": "m0", "keep_set": None, "dtype": "float32", "eos_token_id": 1, "recovered": None}
RECOVERED = {"trained": ["norms"], "parameters_share": 0.036, "tokens": 20480, "text": {"rows": "calib"}}


def random_tokens(n=400, num_blocks=8, seed=0):
    """Kept tokens of 8 blocks; the same positions for every seed."""
    rng = np.random.default_rng(seed)
    block = np.sort(np.arange(n) % num_blocks).astype(np.int32)
    nll = rng.exponential(1.0, n).astype(np.float32)
    return Tokens(block, (np.arange(n) % (n // num_blocks) + 1).astype(np.int32), nll, rng.random(n, np.float32))


def entry(tokens, **changes):
    facts = {"rows_seen": 30, "rows_sha256": "r0"} | {k: v for k, v in changes.items() if k.startswith("rows")}
    return facts | {"model": aggregate(tokens, 8, 0.15)}


def write(folder, label, tokens, meta=(), **changes):
    """A result of ``tokens`` ((pack, seq_len) -> Tokens) as the library writes it."""
    entries = {key: entry(part, **changes) for key, part in tokens.items()}
    return results.write(folder, label, META | {"label": label} | dict(meta), entries, tokens)


@pytest.fixture
def tokens():
    return {
        ("a", 64): random_tokens(seed=1),
        ("UNION", 64): random_tokens(seed=2),
        ("UNION", 128): random_tokens(seed=3),
    }


@pytest.fixture
def path(tmp_path, tokens):
    return write(tmp_path, "base", tokens)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def model_of(content):
    return content["packs"][0]["seq"]["64"]["model"]


def test_what_is_written_is_read_back(path, tokens):
    result = results.read(path)
    assert result.label == "base" and not result.binned
    assert set(result.entries) == set(tokens)
    for (pack, seq_len), part in tokens.items():
        assert result.entries[pack, seq_len] == entry(part)
        found = result.tokens(pack, seq_len)
        for name in ("block", "position", "nll", "entropy"):
            np.testing.assert_array_equal(getattr(found, name), getattr(part, name))


def test_rows_are_read_back_and_an_earlier_file_has_none(tmp_path, tokens):
    rows = np.arange(400, dtype=np.int32) // 7
    key, part = ("UNION", 64), tokens["UNION", 64]
    found = results.read(write(tmp_path, "rows", {key: replace(part, row=rows)})).tokens(*key).row
    assert found.dtype == np.int32 and found.tolist() == rows.tolist()
    assert results.read(write(tmp_path, "earlier", {key: part})).tokens(*key).row is None


def test_token_file_has_the_fixed_columns(path, tokens):
    table = pq.read_table(path.with_name("base.tokens.parquet"))
    assert table.column_names == ["pack", "seq_len", "block", "position", "nll", "entropy"]
    assert str(table.schema.field("nll").type) == str(table.schema.field("entropy").type) == "float"
    assert table.num_rows == sum(len(part.nll) for part in tokens.values())
    assert pq.ParquetFile(path.with_name("base.tokens.parquet")).metadata.row_group(0).column(4).compression == "ZSTD"


def test_hundreds_of_packs_fit_one_file(tmp_path):
    """More than a byte counts."""
    tokens = {(f"pack-{i}", 64): random_tokens(80, seed=i) for i in range(300)}
    result = results.read(write(tmp_path, "many", tokens))
    for key in (("pack-0", 64), ("pack-127", 64), ("pack-128", 64), ("pack-299", 64)):
        np.testing.assert_array_equal(result.tokens(*key).nll, tokens[key].nll)


def test_labels_may_hold_dots(tmp_path, tokens):
    path = write(tmp_path, "keep16.v2", tokens)
    assert path.name == "keep16.v2.json" and (tmp_path / "keep16.v2.tokens.parquet").is_file()
    assert results.read(path).tokens("a", 64) is not None


def test_writing_leaves_only_the_two_files(path):
    assert sorted(p.name for p in path.parent.iterdir()) == ["base.json", "base.tokens.parquet"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_writer_that_fails_leaves_the_old_files(path, tokens, monkeypatch):
    """A disk that is full, or a number that JSON has not, is met before the first file gets its name."""
    old = {file: file.read_bytes() for file in path.parent.iterdir()}
    with pytest.raises(ValueError):
        write(path.parent, "base", {key: random_tokens(seed=9) for key in tokens}, {"bytes_total": float("nan")})
    monkeypatch.setattr(Path, "chmod", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write(path.parent, "base", {key: random_tokens(seed=9) for key in tokens})
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == old


class Killed(BaseException):
    """What no handler is for."""


def test_a_rewrite_that_is_killed_between_its_files_is_not_mistaken_for_a_result(path, tokens, monkeypatch):
    """The new tokens are on disk, the new JSON is not: the old JSON must not be read with the new tokens."""
    rename = Path.replace

    def killed(old, new):
        if new.suffix == ".json":
            raise Killed
        return rename(old, new)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(Killed):
        write(path.parent, "base", {key: random_tokens(seed=9) for key in tokens})
    with pytest.raises(ResultError, match=r"base\.tokens\.parquet is not the file that base\.json was written with"):
        results.read(path).tokens("a", 64)


def test_a_json_never_vouches_for_the_tokens_of_another_writer(tmp_path, tokens, monkeypatch):
    """While one writer is between its two files, another writes both of its own."""
    mine, other = ({key: random_tokens(seed=seed) for key in tokens} for seed in (8, 9))
    rename, begun = Path.replace, []

    def interrupted(old, new):
        done = rename(old, new)
        if not begun:
            begun.append(new.name)
            write(tmp_path, "base", other)
        return done

    monkeypatch.setattr(Path, "replace", interrupted)
    path = write(tmp_path, "base", mine)
    assert begun == ["base.tokens.parquet"]
    assert results.read_tokens(results.tokens_path(path), 8)["a", 64].nll.tolist() == other["a", 64].nll.tolist()
    with pytest.raises(ResultError, match=r"base\.tokens\.parquet is not the file that base\.json was written with"):
        results.read(path).tokens("a", 64)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_json_that_was_cut_short_is_named(path, share):
    text = path.read_text()
    path.write_text(text[: int(len(text) * share)])
    with pytest.raises(ResultError, match=r"base\.json is not JSON"):
        results.read(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(
        ResultError, match=r"nothing\.json does not exist; remove it if it is damaged, and run 03_evaluate"
    ):
        results.read(tmp_path / "nothing.json")


def drop(name):
    return lambda c: model_of(c).pop(name)


def put(name, value):
    return lambda c: model_of(c).update({name: value})


def trained(**facts):
    return lambda c: c["meta"].update(recovered=RECOVERED | facts)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: c.update(schema="eaft-result/99"), ["eaft-result/99", "eaft-result/1"]),
        (lambda c: c.pop("packs"), ["packs"]),
        (lambda c: c.pop("meta"), ["meta"]),
        (trained(parameters_share=3.6), ["meta.recovered.parameters_share"]),
        (trained(tokens="many"), ["meta.recovered.tokens"]),
        (trained(text={}), ["meta.recovered.text.rows"]),
        (drop("ppl"), ["model.ppl"]),
        (drop("hist2d_x_H"), ["hist2d_x_H"]),
        (drop("blocks"), ["blocks"]),
        (put("ppl", "3.0x"), ["model.ppl"]),
        (put("ppl", None), ["model.ppl"]),
        (put("mean_prob", 1.5), ["mean_prob"]),
        (put("cc_rate", -0.1), ["cc_rate"]),
        (put("kept_tokens", 0), ["kept_tokens"]),
        (lambda c: model_of(c)["hist2d_x_H"]["counts"].pop(), ["hist2d_x_H", "19199", "19200"]),
        (lambda c: c["packs"][0]["seq"]["64"].pop("rows_sha256"), ["rows_sha256"]),
        (lambda c: c["packs"][0]["seq"].update(long=c["packs"][0]["seq"]["64"]), ["long"]),
    ],
)
def test_a_file_that_is_no_valid_result_says_where(path, change, words):
    edit(path, change)
    with pytest.raises(ResultError) as error:
        _ = results.read(path).entries
    assert all(word in str(error.value) for word in ["base.json", *words])


@pytest.mark.parametrize("text", ["[]", "3", '"x"', "null"])
def test_other_json_is_no_result(path, text):
    path.write_text(text)
    with pytest.raises(ResultError, match=r"base\.json"):
        results.read(path)


def test_nan_in_a_file_is_refused(path):
    path.write_text(path.read_text().replace('"ppl": ', '"ppl": NaN, "old": ', 1))
    with pytest.raises(ResultError, match="found NaN"):
        results.read(path)


def make_legacy(path):
    """The earlier shape: no schema, no blocks, no row hash, no label, no token file."""

    def change(content):
        del content["schema"], content["meta"]["label"], content["meta"]["tokens_sha256"]
        for pack in content["packs"]:
            for part in pack["seq"].values():
                del part["model"]["blocks"], part["rows_sha256"]

    edit(path, change)
    path.with_name(f"{path.stem}.tokens.parquet").unlink()


def test_an_earlier_file_is_read_and_marked_as_binned(path, tokens):
    make_legacy(path)
    result = results.read(path)
    assert result.binned and result.label == "base" and result.tokens("UNION", 64) is None
    assert set(result.entries) == set(tokens)


def test_tokens_of_the_same_size_but_another_model_are_refused(path, tokens):
    write(path.parent, "other", {key: random_tokens(seed=50) for key in tokens})
    path.with_name("other.tokens.parquet").rename(path.with_name("base.tokens.parquet"))
    with pytest.raises(ResultError, match=r"base\.tokens\.parquet is not the file that base\.json was written with"):
        results.read(path).tokens("UNION", 64)


def test_a_damaged_token_file_is_named(path):
    file = path.with_name("base.tokens.parquet")
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ResultError, match=r"base\.tokens\.parquet"):
        results.read(path).tokens("a", 64)


def test_a_folder_gives_its_results_and_nothing_else(path, tokens):
    write(path.parent, "alpha", tokens)
    (path.parent / "verdict.json").write_text("{}")
    (path.parent / "notes.json").write_text("[1, 2]")
    assert [r.label for r in results.read_all([str(path.parent)])] == ["alpha", "base"]
    assert [r.label for r in results.read_all([str(path), str(path.parent / "alpha.json")])] == ["base", "alpha"]


def test_runs_of_one_model_at_several_lengths_become_one_result(tmp_path, tokens):
    parts = {64: {k: v for k, v in tokens.items() if k[1] == 64}, 128: {k: v for k, v in tokens.items() if k[1] == 128}}
    paths = [str(write(tmp_path / str(length), "base", part)) for length, part in parts.items()]
    whole = results.read(write(tmp_path, "base", tokens))
    (merged,) = results.read_all(paths)
    assert merged.label == "base" and merged.entries == whole.entries
    for key, expected in tokens.items():
        np.testing.assert_array_equal(merged.tokens(*key).nll, expected.nll)


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_blocks", {"64": 8}),
        ("tokenizer_sha256", "t1"),
        ("model_sha256", "m1"),
        ("rows", "all"),
        ("dtype", "bfloat16"),
        ("eos_token_id", 2),
        ("keep_set", {"criterion": "reap"}),
        ("recovered", RECOVERED),
        ("dtype", None),
    ],
)
def test_results_of_different_models_or_settings_do_not_become_one(tmp_path, tokens, name, value):
    paths = [str(write(tmp_path / "a", "base", {("a", 64): tokens["a", 64]}))]
    paths.append(str(write(tmp_path / "b", "base", {("UNION", 64): tokens["UNION", 64]}, meta={name: value})))
    with pytest.raises(ResultError) as error:
        results.read_all(paths)
    assert "not one model's results" in str(error.value)
    assert f"{name} is {value} against {META[name]}. " in str(error.value)


def test_earlier_files_of_one_label_do_not_become_one(tmp_path, tokens):
    """They do not say which rows they were made from."""
    paths = [write(tmp_path / key[0], "base", {key: tokens[key]}) for key in (("a", 64), ("UNION", 64))]
    for path in paths:
        make_legacy(path)
    with pytest.raises(
        ResultError, match=r"a/base\.json is of the earlier shape; .*UNION/base\.json is of the earlier"
    ):
        results.read_all([str(path) for path in paths])


def test_importing_results_needs_no_pydantic():
    program = "import sys; sys.modules['pydantic'] = None; import eaftlib.evaluation.results"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_labels_must_differ(path, tokens):
    write(path.parent / "again", "base", tokens)
    with pytest.raises(ResultError, match=r"label 'base' occurs in .*again.*: a at 64 is there 2 times; UNION at 64"):
        results.read_all([str(path), str(path.parent / "again")])


def test_a_folder_without_results_is_named(tmp_path):
    with pytest.raises(ResultError, match="holds no result JSON"):
        results.read_all([str(tmp_path)])


def test_a_damaged_file_in_a_folder_is_named(path):
    (path.parent / "cut.json").write_text('{"schema": "eaft-res')
    with pytest.raises(ResultError, match=r"cut\.json"):
        results.read_all([str(path.parent)])


@pytest.mark.parametrize("text", ["3", "null", "[]"])
def test_other_json_in_a_folder_is_passed_over(path, text):
    (path.parent / "other.json").write_text(text)
    assert [r.label for r in results.read_all([str(path.parent)])] == ["base"]
