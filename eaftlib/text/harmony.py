"""Completion spans of a conversation rendered in OpenAI's Harmony format."""

import re

_TAG = re.compile(r"<\|(start|channel|message|end|call|return)\|>")


def completion_spans(text: str) -> list[tuple[int, int]]:
    """Character ranges [start, end) of the assistant's message contents, ascending and disjoint.

    In ``<|start|>ROLE[<|channel|>...]<|message|>CONTENT(<|end|>|<|call|>|<|return|>)`` the span is CONTENT, where
    ROLE, stripped, is ``assistant`` or begins with ``assistant `` (a recipient may follow). The closing tag is not
    part of it. A message that another ``<|start|>`` cuts short, or that never closes, has no span.
    """
    spans = []
    role_start = role_end = content_start = None
    for tag in _TAG.finditer(text):
        name = tag[1]
        if name == "start":
            role_start, role_end, content_start = tag.end(), None, None
        elif role_start is None:
            continue
        elif name == "channel":
            role_end = role_end or tag.start()
        elif name == "message":
            if content_start is None:
                role_end = role_end or tag.start()
                content_start = tag.end()
        else:  # a closing tag
            if content_start is not None and _is_assistant(text[role_start:role_end]) and tag.start() > content_start:
                spans.append((content_start, tag.start()))
            role_start = content_start = None
    return spans


def _is_assistant(role: str) -> bool:
    role = role.strip()
    return role == "assistant" or role.startswith("assistant ")
