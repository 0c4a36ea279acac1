"""Reading JSON: whatever lies under the name ends in its content or in the caller's own error."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from eaftlib import files
from eaftlib.errors import ResultError
from eaftlib.files import parse_json, read_json, read_typed, write_atomically, write_json, write_together

NOT_JSON = {
    "empty": b"",
    "cut short": b'{"a": [1, 2',
    "not UTF-8": b'{"a": "\xff"}',
    "no number": b'{"a": NaN}',
    "infinite": b'{"a": -Infinity}',
    "nested deeply": b"[" * 200_000 + b"]" * 200_000,
    "an integer of 5,000 digits": b'{"a": ' + b"9" * 5_000 + b"}",
    "half a surrogate pair": b'{"a": "\\ud800"}',
    "a name twice": b'{"a": 1, "a": 2}',
}


@pytest.mark.parametrize("content", NOT_JSON.values(), ids=NOT_JSON)
def test_what_is_no_json_is_the_callers_error(tmp_path, content):
    file = tmp_path / "x.json"
    file.write_bytes(content)
    with pytest.raises(ResultError, match=r"x\.json.*run it again"):
        parse_json(file, ResultError, "run it again")


def test_what_is_no_file_is_neither_read_nor_waited_for(tmp_path):
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "fifo.json")
    for name in ("folder.json", "fifo.json", "absent.json", "n" * 300):
        with pytest.raises(ResultError, match="run it again"):
            parse_json(tmp_path / name, ResultError, "run it again")


def test_a_whole_surrogate_pair_is_text(tmp_path):
    (tmp_path / "x.json").write_text('{"a": "\\ud83d\\ude00"}')
    assert read_json(tmp_path / "x.json", ResultError, "")["a"] == "😀"


def test_the_first_wrong_field_is_named_with_what_was_found(tmp_path):
    class Shape(BaseModel):
        a: int
        b: list[float]

    file = tmp_path / "x.json"
    file.write_text('{"a": 1, "b": [0.5, "half"]}')
    with pytest.raises(ResultError, match=r"x\.json: b\.1: .*found 'half'; run it again"):
        read_typed(file, Shape, ResultError, "run it again")
    file.write_text('{"a": 1, "b": [0.5]}')
    assert read_typed(file, Shape, ResultError, "").b == [0.5]


def test_a_writer_that_fails_leaves_the_old_file(tmp_path):
    file = tmp_path / "x.json"
    file.write_text("old")

    def failing(temporary):
        with open(temporary, "w") as out:
            out.write("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(file, failing)
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_a_reader_of_the_old_file_never_sees_a_mixture(tmp_path):
    file = tmp_path / "x.json"
    write_json(file, {"old": 1})
    with file.open() as reader:
        write_json(file, {"new": 2})
        assert json.load(reader) == {"old": 1}
    assert json.loads(file.read_text()) == {"new": 2}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_numbers_are_never_written(tmp_path, bad):
    file = tmp_path / "x.json"
    file.write_text("old")
    with pytest.raises(ValueError):
        write_json(file, {"x": bad})
    assert file.read_text() == "old"


WRITER = """
import sys
from pathlib import Path
from eaftlib.files import write_atomically, write_together

def write(temporary):
    Path(temporary).write_text("half")
    print(temporary, flush=True)
    sys.stdin.read()
    Path(temporary).write_text("whole")

write_atomically(Path(sys.argv[1]), write)
"""


@pytest.fixture
def writer(tmp_path):
    """A process that is writing x.json."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "x.json")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.temporary = Path(process.stdout.readline().strip())
    yield process
    process.kill()
    process.communicate()


def test_what_a_killed_writer_left_is_removed_by_the_next_and_nothing_else(tmp_path, writer):
    kept = {tmp_path / name for name in (".x.json.original", ".y.json.abcdefgh.partial", "z")}
    for file in kept:
        file.write_text("")
    (tmp_path / ".x.json.folder.partial").mkdir()
    os.mkfifo(tmp_path / ".x.json.fifo.partial")
    kept |= {tmp_path / f".x.json.{name}.partial" for name in ("folder", "fifo")}
    writer.kill(), writer.wait()
    assert writer.temporary.read_text() == "half"
    write_together(tmp_path, {"x.json": b"new"})
    assert set(tmp_path.iterdir()) == kept | {tmp_path / "x.json"}


def test_what_a_living_writer_is_at_is_left_to_it(tmp_path, writer):
    write_json(tmp_path / "x.json", {})
    assert writer.temporary.read_text() == "half"
    writer.communicate()
    assert (tmp_path / "x.json").read_text() == "whole" and list(tmp_path.iterdir()) == [tmp_path / "x.json"]


def test_a_temporary_file_that_was_taken_for_a_leftover_is_made_again(tmp_path, monkeypatch):
    """Another process comes between its making and its lock."""
    lock, taken = files._lock, []

    def late(handle, how):
        if not taken:
            taken.append(next(tmp_path.iterdir()))
            taken[0].unlink()
        return lock(handle, how)

    monkeypatch.setattr(files, "_lock", late)
    write_json(tmp_path / "x.json", {"a": 1})
    assert taken and read_json(tmp_path / "x.json", ResultError, "") == {"a": 1}
