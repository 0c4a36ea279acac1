"""One conversation, rendered in Harmony format, with marks on the words that its context decides.

A generator wraps a value in ``sure`` where nothing but that value can follow: the last copy of a computed number, an ID
taken from a tool result, a closing sentence that the developer message asked for. ``plain`` drops the marks.
``contradict`` replaces a few marked values instead, which gives rows on which a trained model is sure and wrong.
"""

import json
import re
from random import Random

OPEN, SHUT = "\ue000", "\ue001"  # private-use characters: they occur in no source text
_MARK = re.compile(f"{OPEN}([^{OPEN}{SHUT}]*){SHUT}")
_MARKED_NUMBER = re.compile(f'"{OPEN}(-?[0-9]+(?:\\.[0-9]+)?){SHUT}"')

_DECOYS = (
    "river", "window", "green", "seven", "table", "quiet", "paper", "north", "silver", "garden", "early", "music",
    "stone", "winter", "small", "bridge", "yellow", "heavy", "market", "round", "engine", "bottle", "salt", "open",
)  # fmt: skip

# Phrases of the free sentences in which the last word has no alternative: the surest tokens of all.
_FIXED_PHRASES = {
    "No need to": "No need of",
    "could be about": "could be above",
    "is a good idea": "is a good hat",
    "Feel free to": "Feel free of",
    "What matters here": "What matters hair",
    "is a bit like": "is a bit loud",
    "The same holds for": "The same holds far",
    "because time is": "because time in",
    "easy to miss": "easy to mist",
    "This is like": "This is lime",
    "I think of": "I think if",
    "The user sounds": "The user smells",
    "You may want to": "You may want two",
    "Better to": "Better too",
    "I could also": "I could alas",
}

_SYSTEM = (
    "You are a helpful assistant.", "You are a careful assistant who checks every step.",
    "You are a friendly study partner.", "You are a concise technical assistant.", "You are a patient tutor.",
    "You are an assistant for everyday questions.", "You answer exactly and briefly.",
    "You help people with numbers, words and small programs.",
)  # fmt: skip

CLOSINGS = (
    "Hope this helps.", "Feel free to ask again.", "That is all for now.", "Have a good day.", "Checked twice.",
    "Happy to explain further.", "End of answer.", "Thank you for asking.", "Keep up the good work.",
    "Please verify before use.", "Good luck with the rest.", "This closes the question.",
)  # fmt: skip


def sure(value) -> str:
    """Mark a value that its context decides."""
    return f"{OPEN}{value}{SHUT}"


def plain(marked: str) -> str:
    return marked.replace(OPEN, "").replace(SHUT, "")


def contradict(marked: str, rng: Random) -> str:
    """Replace one to four marked values by others of the same shape, and up to eight words that the grammar fixes.

    Raises if nothing is marked.
    """
    spots = _spots(marked)
    if not spots:
        raise ValueError("a row without marked values cannot be contradicted")
    for spot in sorted(rng.sample(spots, rng.randint(1, min(4, len(spots)))), key=lambda m: -m.start()):
        marked = marked[: spot.start()] + _altered(spot[1], rng) + marked[spot.end() :]
    present = [phrase for phrase in _FIXED_PHRASES if phrase in marked]
    for phrase in rng.sample(present, min(8, len(present))):
        marked = marked.replace(phrase, _FIXED_PHRASES[phrase], 1)
    return plain(marked)


def _spots(marked: str) -> list[re.Match]:
    return [m for m in _MARK.finditer(marked) if re.search(r"[A-Za-z0-9]", m[1])]


def can_contradict(marked: str) -> bool:
    return bool(_spots(marked))


def _altered(value: str, rng: Random) -> str:
    digits = [i for i, c in enumerate(value) if c.isdigit()]
    if digits:
        at = rng.choice(digits)
        other = rng.choice([d for d in "123456789" if d != value[at]])
        return value[:at] + other + value[at + 1 :]
    word = rng.choice(re.findall(r"[A-Za-z]+", value))
    decoy = rng.choice([d for d in _DECOYS if d != word.lower()])
    return re.sub(rf"\b{word}\b", decoy.capitalize() if word[0].isupper() else decoy, value, count=1)


class Chat:
    """Collects the turns of a conversation; ``marked`` is its text with the marks still in."""

    def __init__(self, rng: Random):
        self.rng = rng
        self.question = ""
        self._parts: list[str] = []
        self._closing = ""
        effort = rng.choice(("low", "medium", "high"))
        self._turn("system", f"{rng.choice(_SYSTEM)}\nReasoning: {effort}. Channels: analysis, commentary, final.")

    def developer(self, text: str, heading: str = "Instructions") -> "Chat":
        return self._turn("developer", f"# {heading}\n{text}")

    def maybe_closing(self, share: float) -> "Chat":
        """Sometimes ask, as the developer, that final answers end in a fixed sentence."""
        if self.rng.random() < share:
            self._closing = self.rng.choice(CLOSINGS)
            self.developer(f'End each answer with "{self._closing}"')
        return self

    def user(self, text: str) -> "Chat":
        if self._parts[-1].endswith("<|return|>"):  # an earlier final answer in a longer conversation
            self._parts[-1] = self._parts[-1].removesuffix("<|return|>") + "<|end|>"
        self.question = self.question or text
        return self._turn("user", text)

    def think(self, text: str) -> "Chat":
        return self._turn("assistant<|channel|>analysis", text, marks=True)

    def say(self, text: str) -> "Chat":
        """A note to the user before a tool call."""
        return self._turn("assistant<|channel|>commentary", text, marks=True)

    def call(self, name: str, /, **arguments) -> "Chat":
        body = _MARKED_NUMBER.sub(rf"{OPEN}\1{SHUT}", json.dumps(arguments, ensure_ascii=False))
        role = f"assistant<|channel|>commentary to=functions.{name} <|constrain|>json"
        self._called = name
        return self._turn(role, body, "<|call|>", marks=True)

    def result(self, value) -> "Chat":
        """What the function called last returned."""
        body = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        return self._turn(f"functions.{self._called} to=assistant<|channel|>commentary", body)

    def final(self, text: str) -> "Chat":
        closing = f"\n\n{sure(self._closing)}" if self._closing else ""
        return self._turn("assistant<|channel|>final", text + closing, "<|return|>", marks=True)

    @property
    def marked(self) -> str:
        return "".join(self._parts)

    def _turn(self, role: str, text: str, tag: str = "<|end|>", marks: bool = False) -> "Chat":
        self._parts.append(f"<|start|>{role}<|message|>{text if marks else plain(text)}{tag}")
        return self
