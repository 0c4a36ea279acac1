"""Packs and files of parameters that are not what they should be: the right values or the library's own error, nothing else."""

import collections
import os
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import world

from eaftlib.errors import PackError, ParameterError
from eaftlib.params import check_file, read_file
from eaftlib.text.packs import PackSource

ROWS = [world.conversation(i) for i in range(40)]


def outcome(attempt, right, error):
    """One of: own error, right, wrong; anything else is raised."""
    try:
        return "right" if attempt() == right else "wrong"
    except error as raised:
        return "own error" if str(raised) else "own error without a word"


def whole_pack(path, **settings):
    pq.write_table(pa.table({"text": ROWS}), path, **settings)
    return path.read_bytes()


def rows_of(folder):
    return list(PackSource(str(folder)).rows("p"))


def flips(whole, seed, count):
    """Copies of which one byte is another, half of them in the footer and the pages' headers."""
    rng = random.Random(seed)
    for _ in range(count):
        at = rng.randrange(len(whole)) if rng.random() < 0.5 else len(whole) - 1 - rng.randrange(len(whole) // 4)
        yield whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :]


def test_a_flipped_byte_of_a_pack_is_the_librarys_own_error_or_harmless(tmp_path):
    """Its pages have checksums; in a file without them, other letters are other text, which only ``rows_sha256`` tells."""
    whole = whole_pack(tmp_path / "p.parquet", write_page_checksum=True)
    found = collections.Counter()
    for damaged in flips(whole, seed=0, count=60):
        (tmp_path / "p.parquet").write_bytes(damaged)
        found[outcome(lambda: rows_of(tmp_path), ROWS, PackError)] += 1
    assert found.keys() <= {"own error", "right"} and found["own error"] > 20, found


def test_text_that_is_no_utf8_is_named_with_its_row(tmp_path):
    whole = whole_pack(tmp_path / "p.parquet", compression="none", use_dictionary=False)
    at = whole.rindex(ROWS[39].encode()[-40:])
    (tmp_path / "p.parquet").write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
    with pytest.raises(PackError, match=r"p\.parquet cannot be read on from row 32 .*utf-8"):
        rows_of(tmp_path)


def test_a_pack_that_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "p.parquet")
    with pytest.raises(PackError, match=r"p\.parquet is no file"):
        PackSource(str(tmp_path))
    (tmp_path / "p.parquet").unlink()
    (tmp_path / "p.parquet").mkdir()
    with pytest.raises(PackError, match=r"p\.parquet is no file"):
        PackSource(str(tmp_path), ["p.parquet"])


def test_two_columns_named_text_are_refused(tmp_path):
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "p.parquet")
    with pytest.raises(PackError, match="expected one string column 'text'"):
        PackSource(str(tmp_path))


def test_a_pack_without_rows_is_refused(tmp_path):
    world.write_pack(tmp_path / "a.parquet", ["a"])
    world.write_pack(tmp_path / "b.parquet", [])
    with pytest.raises(PackError, match=r"b\.parquet has no rows"):
        PackSource(str(tmp_path))


@pytest.mark.parametrize("name", ["UNION", "a$b", "a\nb", " a", "a|b", "<img>", "a\udc80"])
def test_names_that_are_none_are_refused(tmp_path, name):
    world.write_pack(tmp_path / "x.parquet", ["a"]).rename(tmp_path / f"{name}.parquet")
    with pytest.raises(PackError, match="named UNION" if name == "UNION" else "for a pack's name"):
        PackSource(str(tmp_path))


@pytest.mark.parametrize("name", ["Ünïon v2", "union", "日本語", "a.b-c+d_e"])
def test_names_of_letters_are_taken(tmp_path, name):
    world.write_pack(tmp_path / f"{name}.parquet", ["a"])
    assert PackSource(str(tmp_path)).names == [name, "UNION"]


PARAMETERS = [
    b"a: [",
    b"a: 1\na: 2",
    b"a: {b: {c: 1, c: 2}}",
    b"? [a, b]\n: 1",
    b"a: {[b]: 1}",
    b"a:\t- 1",
    b"\tseq_lens: [1]",
    b"a: \xff",
    b"a: \x00",
    b"seq_lens: [" + b"9" * 5000 + b"]",
    b"seq_lens: [0x" + b"f" * 5000 + b"]",
    b"seq_lens: [" + b"9" * 50 + b"]",
    b"num_blocks: " + b"9" * 50,
    b"a: 0x_",
    b"a: 2026-13-45",
    b"a: !!timestamp x",
    b"a: !!bool x",
    b"a: !!python/object:os.system {}",
    b"model: " + b"[" * 20_000,
    b"model: &a [*a]",
    b"a0: &a0 [x]\n" + b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (i + 1, i + 1, i, i) for i in range(60)),
    b"a0: &a0 {x: 1}\n" + b"".join(b"a%d: &a%d {<<: [*a%d, *a%d]}\n" % (i + 1, i + 1, i, i) for i in range(60)),
    b"cc_quantile: .nan",
    b"cc_quantile: .inf",
    b"max_gpu_memory: .inf",
    b'model: "\\ud800"',
    b'"\\ud800": 1',
    b'a: "\\U00110000"',
    b"seq_lens: [16, 16]",
    b"<<: 1",
    b"*a : 1",
    b"a: 1\n---\nb: 2",
    b"",
    b"null",
    b"- 1",
]


@pytest.mark.parametrize("content", PARAMETERS, ids=range(len(PARAMETERS)))
def test_files_of_parameters_that_are_none(tmp_path, content):
    (tmp_path / "p.yaml").write_bytes(content)
    with pytest.raises(ParameterError, match=r"p\.yaml") as error:
        check_file("03_evaluate", tmp_path / "p.yaml")
    assert len(str(error.value)) < 1000


def test_parameters_that_are_no_file(tmp_path):
    os.mkfifo(tmp_path / "p.yaml")
    for path in (tmp_path / "p.yaml", tmp_path, tmp_path / "no.yaml"):
        with pytest.raises(ParameterError):
            read_file(path)
