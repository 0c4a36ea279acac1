"""Reading JSON: whatever lies under the name ends in its content or in the caller's own error."""

import os

import pytest
from pydantic import BaseModel

from eaftlib.errors import ResultError
from eaftlib.files import parse_json, read_json, read_typed

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
