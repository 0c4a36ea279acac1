"""Rows with forged, nested and unclosed tags against the grammar in ``eaftlib.text.harmony``, as a machine of states."""

from hypothesis import given, settings
from hypothesis import strategies as st

from eaftlib.text.harmony import completion_spans

CLOSING = ("<|end|>", "<|call|>", "<|return|>")
TAGS = ("<|start|>", "<|channel|>", "<|message|>", *CLOSING)


def spans_of_grammar(text):
    """Character by character, a state and what it has gathered: outside, role, channel or content."""
    spans, state, role, began, at = [], "outside", "", 0, 0
    while at < len(text):
        tag = next((tag for tag in TAGS if text.startswith(tag, at)), None)
        if tag == "<|start|>":
            state, role = "role", ""
        elif tag in CLOSING:
            if state == "content" and at > began and assistants(role):
                spans.append((began, at))
            state = "outside"
        elif tag == "<|channel|>" and state == "role":
            state = "channel"
        elif tag == "<|message|>" and state in ("role", "channel"):
            state, began = "content", at + len(tag)
        elif tag is None and state == "role":
            role += text[at]
        at += len(tag) if tag else 1
    return spans


def assistants(role):
    words = role.strip().split(" ")
    return words[0] == "assistant"


parts = [
    "assistant",
    "assistant ",
    " to=f",
    "user",
    "\n",
    "\t",
    "<|",
    "|>",
    "<|end",
    "<|START|>",
    "<|constrain|>",
    "é🙂",
    "<<|end|>>",
]
nested = [
    "<|st<|start|>art|>",
    "<|start|>assistant<|message|>",
    "<|start|>assistant<|channel|>a<|channel|>b<|message|>",
]
rows = st.lists(st.sampled_from([*TAGS, *parts, *nested]) | st.text("<|>starend ", max_size=6), max_size=30).map(
    "".join
)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(rows)
def test_spans_are_those_of_the_grammar(text):
    assert completion_spans(text) == spans_of_grammar(text)


def test_a_megabyte_of_tags_takes_a_single_look():
    text = "<|start|>assistant<|message|>" * 35_000 + "x<|end|>" + "<|" * 100_000
    assert completion_spans(text) == [(35_000 * 29, 35_000 * 29 + 1)]
