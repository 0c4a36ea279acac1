"""Foreign text in Markdown: labels and names of models, which anyone may have chosen."""

import re

# What begins emphasis, code, a link, a cell, an entity, a tag, a formula or an address, in CommonMark or in GitHub's.
_MEANS_SOMETHING = re.compile(r"[\\`*_\[\]<>#|~&$@]|:(?=//|\w+:)|(?<=www)\.", re.IGNORECASE)


def plain(text: object) -> str:
    """The text with a backslash before every character that Markdown would read as more than itself, on one line."""
    one_line = "".join(c if c.isprintable() else " " for c in str(text))
    return _MEANS_SOMETHING.sub(r"\\\g<0>", one_line)
