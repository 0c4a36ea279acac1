"""Free sentences, drawn from a small grammar: the words in an answer that nothing in its context decides."""

import re
from random import Random


def _phrases(text: str) -> list[str]:
    return text.split("; ")


_THINGS = (
    "acorns anchors arches arrows atoms badges balloons bananas barrels beans bears bees bells belts benches "
    "berries birds blankets blocks boats bolts bowls boxes bricks brooms bubbles buses cables cakes camels "
    "cameras canals candles canoes cards carrots castles caves cells chains cherries chimneys circles clocks "
    "clouds coats coins colors columns combs cookies corks crabs crates crows cups curtains deer desks dice dolls "
    "domes doors drawers dresses drums ducks dunes eagles elbows engines farms feathers fences ferries fields "
    "fires flags flowers forks foxes frames frogs fruits gardens gates geese ghosts glaciers goats grapes guitars "
    "hats hills hinges horses hotels icebergs islands jackets jars jewels keys kites knots ladders lakes lamps "
    "leaves lemons letters levers lions lists locks logs maps marbles masks meadows melons mirrors moons moths "
    "mountains mushrooms nests nets nuts oceans olives onions orchards ovens owls oysters pages paths pearls "
    "pebbles penguins peppers photos pianos pillows pipes pirates planets plates ponds pots puddles pumps puppets "
    "puzzles queues rabbits radios rails recipes ribbons rings rivers roads robots rockets roofs roots roses "
    "sails sandals scales schools seals seeds shadows sheep shells ships shoes shovels signs skates sleds snails "
    "socks songs spiders sponges squares stairs stamps stars stones stoves streets tables tents tickets tigers "
    "tiles toads towers towns trains trees trucks tunnels turtles valleys vans villages violins wagons walls "
    "watches waves wells whales wheels windows wings wolves worms zebras"
).split()

_GRAMMAR = {
    "thought": (
        "The user sounds {mood}, so I keep the {part} {manner}.",
        "I will be {manner} about the {part}.",
        "If the {part} looks {state}, I {action} it {when}.",
        "What matters here is the {part}, not the {part}.",
        "My {part} should stay {state} and {state}.",
        "{Habit} helps with a {state} {part}.",
        "There may be a {state} {part}; I {action} that {when}.",
        "I could also {action} the {part}, but {reason}.",
        "Better to {action} the {part} {when}, because {reason}.",
        "No need to {action} anything else, since {reason}.",
        "This is like sorting {things}, only with {things}.",
        "I think of {things} and {things} here, but {reason}.",
        "As with {things}, the {part} should be {state}.",
        "Compare {things}: {state} at first, {state} {when}.",
        "It could be about {things}; I {action} that {when}.",
    ),
    "remark": (
        "If you like, I can {action} the {part} {when}.",
        "Tell me {when} whether the {part} looks {state}.",
        "You may want to {action} the {part}, because {reason}.",
        "{Habit} is a good idea if the {part} is {state}.",
        "I kept the {part} {manner}; {reason}.",
        "Should the {part} be {state}, just {action} it {when}.",
        "Note that the {part} can be {state} {when}.",
        "I did not {action} the {part}, since {reason}.",
        "Feel free to {action} the {part} {when}.",
        "For a {state} {part}, {habit} works too.",
        "It is a bit like {things} and {things}.",
        "For {things} the {part} would be {state}.",
        "The same holds for {things}, {things} and {things}.",
        "Ask about {things} or {things} {when}.",
        "With {things} you would {action} the {part} {when}.",
    ),
    "mood": _phrases("friendly; busy; curious; impatient; unsure; relaxed; polite; serious; hurried; cheerful"),
    "part": _phrases(
        "answer; result; order; wording; list; detail; request; number; format; summary; question; example; "
        "note; value; name; outcome; plan; choice; line; record; text; check"
    ),
    "manner": _phrases("short; simple; exact; plain; careful; brief; modest; neat; direct; formal; open; calm"),
    "state": _phrases(
        "clear; complete; odd; empty; long; useful; vague; new; correct; wrong; small; late; final; early; "
        "different; strange; good; rough; minor; common"
    ),
    "action": _phrases(
        "check; repeat; explain; change; compare; save; skip; shorten; mention; correct; confirm; extend; "
        "question; rename; review; count; drop; copy; sort; test"
    ),
    "when": _phrases(
        "first; now; later; at the end; once more; next time; right away; in a moment; before noon; after "
        "that; in the meantime; tomorrow"
    ),
    "habit": _phrases(
        "reading twice; a second look; patience; good order; a short pause; careful counting; a fresh copy; "
        "asking early; writing things down; a small test; plain language; starting over"
    ),
    "reason": _phrases(
        "time is short; nothing else was asked; it saves work; errors hide there; the rest follows; it is "
        "easy to miss; the facts are plain; it costs little; habits differ; this is enough; two checks are "
        "better; the order matters; people forget it; it reads better"
    ),
    "things": _THINGS,
}


def thoughts(rng: Random, low: int, high: int) -> str:
    """That many sentences for the analysis channel, each with a space before it."""
    return "".join(f" {_expand(rng, 'thought')}" for _ in range(rng.randint(low, high)))


def remarks(rng: Random, low: int, high: int) -> str:
    """That many sentences for the final channel, each with a space before it."""
    return "".join(f" {_expand(rng, 'remark')}" for _ in range(rng.randint(low, high)))


def _expand(rng: Random, kind: str) -> str:
    out = []
    for piece in rng.choice(_GRAMMAR[kind]).replace("}", "{").split("{"):
        words = _GRAMMAR.get(piece.lower())
        out.append(piece if words is None else _cased(rng.choice(words), piece))
    return re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", "".join(out))  # "a useful" keeps its article


def _cased(text: str, like: str) -> str:
    return text.capitalize() if like[0].isupper() else text
