"""Completion spans of a conversation rendered in OpenAI's Harmony format."""

import re

_TAG = re.compile(r"<\|(start|channel|message|end|call|return)\|>")


def completion_spans(text: str) -> list[tuple[int, int]]:
    """Character ranges [start, end) of the assistant's message contents, ascending and disjoint.

    The grammar, over text in which six tags are recognised wherever they stand (no escape, no other spelling)::

        row      = (message | broken | CLOSE | CHANNEL | MESSAGE | text)*
        message  = START role [CHANNEL header] MESSAGE content CLOSE
        broken   = what begins with START and is no message, up to the next START, the first CLOSE or the end of the row
        role     = text                                     START   = <|start|>
        header   = (text | CHANNEL)*                        CHANNEL = <|channel|>
        content  = (text | CHANNEL | MESSAGE)*              MESSAGE = <|message|>
        text     = characters without a tag                 CLOSE   = <|end|>, <|call|> or <|return|>

    The span is ``content``, if it is not empty and ``role``, stripped, is ``assistant`` or begins with ``assistant `` (a
    recipient may follow). So a forged START within a message breaks that message, a second CHANNEL or MESSAGE within content is
    content, and what never closes has no span.
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
