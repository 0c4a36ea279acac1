"""What is fuzzed: bytes in, nothing out; an AssertionError, or a foreign exception, where the library is wrong.

Bytes are read as a short program: for spans, pieces of a conversation; for a file, edits of a valid one. So mutations of
bytes are mutations of what matters, and small inputs reach deep.
"""

import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from eaftlib.errors import ResultError
from eaftlib.text.harmony import completion_spans

TAGS = [f"<|{name}|>" for name in ("start", "channel", "message", "end", "call", "return", "constrain", "start|>start")]
TEXTS = [
    "assistant",
    "user",
    "assistant ",
    " assistant",
    "assistant to=f",
    "assistants",
    "a",
    "",
    " ",
    "<|",
    "|>",
    "\n",
    "é",
    "😀",
]
PIECES = [*TAGS, *TEXTS]
VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    0.5,
    -0.0,
    1e308,
    2**31,
    2**63,
    10**30,
    "",
    "x",
    "base",
    "1024",
    "\ud83d\ude00",
    [],
    {},
    [[]],
    [None],
]


class Bytes:
    """A program's bytes, one after another; zeros when they are used up."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    @property
    def left(self) -> bool:
        return self.at < len(self.data)

    def below(self, n: int) -> int:
        """0 to n - 1, from two bytes."""
        pair = self.data[self.at : self.at + 2]
        self.at += 2
        return int.from_bytes(pair, "little") % n if n else 0


def spans() -> Callable[[bytes], None]:
    def check(data: bytes) -> None:
        program, pieces = Bytes(data), []
        while program.left:
            pieces.append(PIECES[program.below(len(PIECES))])
        text = "".join(pieces)
        assert completion_spans(text) == spans_by_hand(text), text

    return check


def spans_by_hand(text: str) -> list[tuple[int, int]]:
    """The grammar of completion spans, a character at a time; see ``eaftlib.text.harmony``."""
    spans, at, state, role, content = [], 0, "outside", "", 0
    while at < len(text):
        tag = next(
            (t for t in ("start", "channel", "message", "end", "call", "return") if text.startswith(f"<|{t}|>", at)),
            None,
        )
        after = at + len(tag) + 4 if tag else at + 1
        if tag == "start":
            state, role = "role", ""
        elif tag is None:
            role += text[at] if state == "role" else ""
        elif state == "outside":
            pass
        elif tag == "channel":
            state = "header" if state == "role" else state
        elif tag == "message":
            if state in ("role", "header"):
                state, content = "content", after
        else:
            if state == "content" and role.strip().split(" ")[0] == "assistant" and at > content:
                spans.append((content, at))
            state = "outside"
        at = after
    return spans


def edited(document: object, program: Bytes) -> object:
    """A copy of a JSON document with up to three edits: a value exchanged, shifted, removed, doubled, or moved."""
    document = copy.deepcopy(document)
    for _ in range(1 + program.below(3)):
        parent, key = _place(document, program)
        if parent is None:
            continue
        kind = program.below(6)
        if kind == 0:
            parent[key] = VALUES[program.below(len(VALUES))]
        elif kind == 1:
            number = parent[key] if isinstance(parent[key], int | float) else 0
            parent[key] = number + (program.below(65536) - 32768) / (1, 10, 1000, 32768)[program.below(4)]
        elif kind == 2:
            del parent[key]
        elif kind == 3 and isinstance(parent, list):
            parent.insert(program.below(len(parent) + 1), copy.deepcopy(parent[key]))
        elif kind == 4:
            other, name = _place(document, program)
            if other is not None:
                parent[key] = copy.deepcopy(other[name])
        elif isinstance(parent, list):
            parent.reverse()
        else:
            parent[TEXTS[program.below(len(TEXTS))]] = parent.pop(key)
    return document


def _place(document: object, program: Bytes) -> tuple[dict | list | None, object]:
    """A container in the document and one of its keys; deeper with every step that the program takes."""
    parent, key, here = None, None, document
    while isinstance(here, dict | list) and here:
        parent, key = (
            here,
            sorted(here)[program.below(len(here))] if isinstance(here, dict) else program.below(len(here)),
        )
        here = parent[key]
        if program.below(8) == 7:
            break
    return parent, key


def result() -> Callable[[bytes], None]:
    """A result with its tokens: what is accepted has the numbers that were written."""
    from test_results import random_tokens, write

    from eaftlib.evaluation import results

    folder = tempfile.TemporaryDirectory(prefix="fuzz-")
    path = write(Path(folder.name), "base", {("a", 64): random_tokens(seed=1)})
    original = json.loads(path.read_text())
    numbers = _numbers(results.read(path))

    def check(data: bytes, folder=folder) -> None:  # which is there as long as this is
        path.write_text(json.dumps(edited(original, Bytes(data))))
        try:
            found = results.read(path)
            for key in found.entries:
                found.tokens(*key)
        except ResultError:
            return
        assert _numbers(found) == numbers, "accepted with other numbers"

    return check


def _numbers(result) -> dict:
    """What comparisons use of each entry, to seven digits."""
    names = ("ppl", "mean_nll", "mean_prob", "mean_entropy", "p_thr", "h_thr", "cc_rate", "cc_count", "kept_tokens")
    return {
        key: [*(f"{entry['model'][name]:.6e}" for name in names), entry["model"]["hist2d_x_H"]["counts"]]
        for key, entry in result.entries.items()
    }


def ranking() -> Callable[[bytes], None]:
    """A ranking is under its hash: what is accepted is what was written."""
    from rankings import write_valid

    from eaftlib.pruning.ranking import read_ranking

    folder = tempfile.TemporaryDirectory(prefix="fuzz-")
    original = write_valid(Path(folder.name))
    path = Path(folder.name, "ranking.json")
    assert read_ranking(path) == original

    def check(data: bytes, folder=folder) -> None:
        path.write_text(json.dumps(edited(original, Bytes(data))))
        try:
            found = read_ranking(path)
        except ResultError:
            return
        for name in ("num_layers", "num_experts", "criteria", "provenance"):
            assert found[name] == original[name], f"accepted with other {name}"

    return check


TARGETS = {"spans": spans, "result": result, "ranking": ranking}
