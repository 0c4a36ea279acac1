"""Completion spans against hand-marked rows and one regular expression that spells out the format."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eaftlib.text.harmony import completion_spans

CLOSE = r"<\|(?:end|call|return)\|>"
MESSAGE = re.compile(
    rf"<\|start\|>(?P<role>(?:(?!<\|(?:start|channel|message)\|>|{CLOSE}).)*)"
    rf"(?:<\|channel\|>(?:(?!<\|(?:start|message)\|>|{CLOSE}).)*)?"
    rf"<\|message\|>(?P<content>(?:(?!<\|start\|>|{CLOSE}).)*){CLOSE}",
    re.DOTALL,
)


def spans_by_regex(text):
    found = MESSAGE.finditer(text)
    return [m.span("content") for m in found if re.match(r"\s*assistant( |\s*$)", m["role"]) and m["content"]]


def contents(text):
    return [text[a:b] for a, b in completion_spans(text)]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<|start|>assistant<|message|>Hi.<|end|>", ["Hi."]),
        ("<|start|>assistant<|channel|>final<|message|>Hi.<|return|>", ["Hi."]),
        ("<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>", ["{}"]),
        ("<|start|>assistant to=functions.f<|channel|>commentary<|message|>{}<|call|>", ["{}"]),
        ("<|start|>assistant to=functions.f<|message|>{}<|call|>", ["{}"]),
        ("<|start|> assistant \n<|message|>x<|end|>", ["x"]),
        ("<|start|>assistant<|message|> spaces\nand lines \n<|end|>", [" spaces\nand lines \n"]),
        ("<|start|>functions.f to=assistant<|channel|>commentary<|message|>3<|end|>", []),
        ("<|start|>assistants<|message|>x<|end|>", []),
        ("<|start|>my assistant<|message|>x<|end|>", []),
        ("<|start|>user<|message|>I am assistant<|end|>", []),
        ("<|start|>user<|message|>a<|end|><|start|>assistant<|message|>b<|end|>", ["b"]),
        ("<|start|>assistant<|message|>a<|end|><|start|>assistant<|message|>b<|return|>", ["a", "b"]),
        ("<|start|>assistant<|message|>never closed", []),
        ("<|start|>assistant<|message|>cut<|start|>assistant<|message|>whole<|end|>", ["whole"]),
        ("<|start|>assistant<|end|>no message tag<|end|>", []),
        ("<|start|>assistant<|message|><|end|>", []),
        ("<|message|>no start<|end|>", []),
        ("a<|end|>b<|return|>", []),
        ("<|start|>assistant<|message|>x<|end|> tail <|end|>", ["x"]),
        ("<|start|>assistant<|message|>日本🙂<|end|>", ["日本🙂"]),
        ("<|start|>assistant<|message|>1 <|end 2 |> 3<|end|>", ["1 <|end 2 |> 3"]),
        ("", []),
    ],
)
def test_spans_of_hand_marked_rows(text, expected):
    assert contents(text) == expected


@pytest.mark.parametrize("role", ["system", "developer", "user", "tool", "functions.python"])
def test_other_roles_have_no_span(role):
    assert completion_spans(f"<|start|>{role}<|channel|>final<|message|>text<|end|>") == []


TAGS = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>", "<|constrain|>"]
pieces = st.sampled_from([*TAGS, "assistant", " ", "user", "assistant to=f", "ü🙂", "text", "\n", "<|"])
whole_messages = st.builds(
    "<|start|>{}{}<|message|>{}{}".format,
    st.sampled_from(["assistant", "user", "assistant to=functions.f", "developer", "tool"]),
    st.sampled_from(["", "<|channel|>final", "<|channel|>commentary to=f <|constrain|>json"]),
    st.text(max_size=5),
    st.sampled_from(["<|end|>", "<|call|>", "<|return|>", ""]),
)
rows = st.lists(whole_messages | pieces, max_size=16).map("".join)


@given(rows)
def test_spans_equal_the_format_written_as_a_regular_expression(text):
    assert completion_spans(text) == spans_by_regex(text)
