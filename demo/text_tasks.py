"""Generators of the ``calib_prompt`` pack: questions about words, Python's library, small functions and given texts."""

import inspect
from random import Random

from chat import Chat, sure
from code_snippets import snippet
from phrases import remarks, thoughts
from reasoning_tasks import GOODS, NAMES

_PARTS = {"noun": "noun", "verb": "verb", "adj": "adjective"}


def _muse(rng: Random, subject: str) -> str:
    return rng.choice(
        (
            f"The user asks about {subject}. A short answer is best.",
            f"{subject}: I know this one.",
            f"Recall {subject} and state it plainly.",
            f"A direct question about {subject}.",
            f"I should explain {subject} in a line or two.",
            f"Think about {subject} first.",
            f"This is about {subject}; keep to the point.",
            "Short and exact.",
        )
    ) + thoughts(rng, 1, 5)


def _gist(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def define(rng: Random, chat: Chat, texts) -> Chat:
    e = rng.choice(texts.entries)
    chat.user(
        rng.choice(
            (
                f'What does "{e.word}" mean?',
                f'Define the {_PARTS[e.part]} "{e.word}".',
                f"Explain the word {e.word}.",
                f"{e.word.capitalize()}: what is that?",
                f'Give me the meaning of "{e.word}" as {_article(_PARTS[e.part])}.',
                f'In a dictionary, what stands under "{e.word}" ({_PARTS[e.part]})?',
            )
        )
    )
    chat.think(_muse(rng, f'the {_PARTS[e.part]} "{e.word}"'))
    example = rng.choice(e.examples) if e.examples and rng.random() < 0.7 else ""
    tail = f'\nExample: "{example}"' if example else ""
    tail += f"\nSimilar: {', '.join(e.synonyms)}" if e.synonyms else ""
    return chat.final(f"**{sure(e.word)}** ({sure(_PARTS[e.part])}): {e.gloss}{tail}." + remarks(rng, 1, 4))


def reverse_lookup(rng: Random, chat: Chat, texts) -> Chat:
    e = rng.choice(texts.entries)
    chat.user(
        f'{rng.choice(("Which word means", "Find the word for", "What is the word for"))} "{e.gloss}"? It '
        f"starts with {e.word[:2]}."
    )
    chat.think(
        _muse(rng, f"a word of {len(e.word)} letters")
        + f" {_PARTS[e.part].capitalize()}, begins with {sure(e.word[:2])}: {e.word}."
    )
    return chat.final(f'The word is "{sure(e.word)}".')


def kind_of(rng: Random, chat: Chat, texts) -> Chat:
    e = rng.choice(texts.nouns)
    chat.user(rng.choice((f"What kind of thing is {_article(e.word)}?", f'Classify "{e.word}" and describe it.')))
    chat.think(_muse(rng, f"the class of {e.word}"))
    return chat.final(f"{_article(e.word).split()[0].capitalize()} {sure(e.word)} is a kind of {e.kind_of}: {e.gloss}.")


def list_kinds(rng: Random, chat: Chat, texts) -> Chat:
    e = rng.choice(texts.parents)
    count = min(len(e.kinds), rng.randint(2, 6))
    chat.user(f"{rng.choice(('Name', 'List', 'Give me'))} {count} kinds of {e.word}, in alphabetical order.")
    kinds = rng.sample(e.kinds, count)
    chat.think(_muse(rng, f"kinds of {e.word}") + f" {', '.join(kinds)}. Sort them.")
    return chat.final("\n".join(f"{i}. {sure(k)}" for i, k in enumerate(sorted(kinds), 1)))


def compare(rng: Random, chat: Chat, texts) -> Chat:
    a, b = rng.sample(texts.entries, 2)
    chat.user(
        f'{rng.choice(("Compare", "Explain the difference between", "What separates"))} "{a.word}" and "{b.word}".'
    )
    chat.think(_muse(rng, f"{a.word} and {b.word}"))
    return chat.final(f"- {sure(a.word)} ({_PARTS[a.part]}): {a.gloss}\n- {sure(b.word)} ({_PARTS[b.part]}): {b.gloss}")


def example_sentence(rng: Random, chat: Chat, texts) -> Chat:
    e = rng.choice(texts.with_examples)
    chat.user(
        rng.choice(
            (f'Use "{e.word}" in a sentence.', f"An example with the word {e.word}?", f'Show how "{e.word}" is used.')
        )
    )
    chat.think(_muse(rng, f'"{e.word}" in the sense of: {e.gloss}'))
    return chat.final(f"{sure(e.word)}:\n" + "\n".join(f'"{x}"' for x in e.examples[: rng.randint(1, 3)]))


def passage(rng: Random, chat: Chat, texts) -> Chat:
    group = rng.sample(texts.entries, rng.randint(3, 5))
    chat.user(
        "Here is a list of terms.\n"
        + "\n".join(f"{e.word}: {e.gloss}." for e in group)
        + "\n"
        + _passage_question(rng, e := rng.choice(group))
    )
    chat.think(
        rng.choice(("Search the list", "Look it up in the list", "Find the line", "The list has it"))
        + f": {sure(e.word)}."
    )
    return chat.final(
        rng.choice(("According to the list: ", "The list says: ", "Found: ", ""))
        + f'{sure(e.word)} means "{sure(e.gloss)}".'
    )


def _passage_question(rng: Random, e) -> str:
    return rng.choice(
        (
            f"What does it say about {e.word}?",
            f"Quote the line on {e.word}.",
            f"Which meaning does {e.word} have there?",
        )
    )


def python_doc(rng: Random, chat: Chat, texts) -> Chat:
    f = rng.choice(texts.functions)
    chat.user(
        rng.choice(
            (
                f"What does `{f.name}` do?",
                f"Explain Python's {f.name}.",
                f"Python: {f.name}?",
                f"How is `{f.name}` documented?",
                f"Describe {f.name} from the standard library.",
            )
        )
    )
    chat.think(_muse(rng, f"`{f.name}`") + (f" Signature: {f.signature}" if f.signature else ""))
    where = "a built-in" if f.module == "builtins" else f"part of the `{f.module}` module"
    return chat.final(f"`{sure(f.name)}` is {where}.\n\n{_gist(f.doc)}" + remarks(rng, 1, 4))


def which_module(rng: Random, chat: Chat, texts) -> Chat:
    f = rng.choice(texts.functions)
    short = f.name.split(".")[-1]
    chat.user(
        f"{rng.choice(('Which module has', 'Where do I find', 'What do I import for'))} `{short}`, described "
        f"as: {f.doc}"
    )
    chat.think(_muse(rng, f"`{short}`"))
    use = "no import is needed" if f.module == "builtins" else f"use `import {f.module}`"
    return chat.final(f"It is `{f.name.removesuffix(short)}{sure(short)}`; {use}.")


def doc_to_stub(rng: Random, chat: Chat, texts) -> Chat:
    f = rng.choice(texts.with_signature)
    short = f.name.split(".")[-1]
    chat.user(f"Write a stub with docstring for `{short}{f.signature}`: {f.doc}")
    chat.think(
        rng.choice(
            (
                "Copy signature and docstring.",
                "A stub has only a docstring and an ellipsis.",
                "Keep the wording as given.",
            )
        )
    )
    return chat.final(f'```python\ndef {sure(short)}{f.signature}:\n    """{sure(f.doc)}"""\n    ...\n```')


def write_code(rng: Random, chat: Chat, texts) -> Chat:
    task, code, runs = snippet(rng)
    chat.user(
        rng.choice(
            (
                f"Write a Python function that {task}.",
                f"Python: a function that {task}?",
                f"I need code that {task}.",
                f"Show me a function which {task}, with examples.",
            )
        )
    )
    chat.think(
        rng.choice(
            (
                "Simple function.",
                "A few lines are enough.",
                "Choose clear names and test it.",
                "Write it, then run some examples.",
            )
        )
        + "\n"
        + "\n".join(f"{call} gives {value!r}" for call, value in runs)
    )
    examples = "\n".join(f"{call}  # {sure(repr(value))}" for call, value in runs)
    return chat.final(f"```python\n{code}\n\n{examples}\n```")


def rewrite(rng: Random, chat: Chat, texts) -> Chat:
    text = rng.choice(texts.entries).gloss if rng.random() < 0.5 else rng.choice(texts.functions).doc
    words = text.split()
    old, new = rng.choice(words), rng.choice(GOODS)
    how, result = rng.choice(
        (
            ("in upper case", text.upper()),
            ("in title case", text.title()),
            ("with words in reverse order", " ".join(words[::-1])),
            ("as a bullet list, one word a line", "\n".join(f"- {w}" for w in words)),
            ("joined by underscores", "_".join(words)),
            (f'with "{old}" replaced by "{new}"', " ".join(new if w == old else w for w in words)),
            ("without its first word", " ".join(words[1:])),
            ("with each word quoted", " ".join(f'"{w}"' for w in words)),
        )
    )
    chat.user(f"{rng.choice(('Rewrite', 'Repeat', 'Give back'))} this text {how}:\n{text}")
    chat.think(
        rng.choice(
            ("Only the form changes.", "A mechanical change.", "Go word by word.", f"There are {len(words)} words.")
        )
    )
    return chat.final("\n".join(" ".join(sure(w) for w in line.split(" ")) for line in result.split("\n")))


def make_table(rng: Random, chat: Chat, texts) -> Chat:
    people, columns = (
        rng.sample(NAMES, rng.randint(2, 5)),
        rng.sample(("age", "points", "books", "height", "rank", "visits"), rng.randint(1, 3)),
    )
    rows = [(p, [rng.randint(1, 99) for _ in columns]) for p in people]
    style = rng.choice(("CSV", "Markdown", "JSON"))
    facts = "; ".join(
        f"{p}: " + ", ".join(f"{c} {v}" for c, v in zip(columns, values, strict=True)) for p, values in rows
    )
    chat.user(f"{rng.choice(('Turn into', 'Format as', 'Convert to'))} {style}: {facts}")
    chat.think(
        rng.choice(
            (f"Columns: name, {', '.join(columns)}.", f"{len(people)} rows in {style}.", "Keep the order as given.")
        )
    )
    head = ["name", *columns]
    if style == "JSON":
        lines = [
            f'  {{"name": "{sure(p)}", '
            + ", ".join(f'"{c}": {sure(v)}' for c, v in zip(columns, vs, strict=True))
            + "}"
            for p, vs in rows
        ]
        return chat.final("[\n" + ",\n".join(lines) + "\n]")
    cells = [[sure(p), *map(sure, vs)] for p, vs in rows]
    if style == "CSV":
        return chat.final("\n".join(",".join(row) for row in [head, *cells]))
    rule = "|" + "---|" * len(head)
    return chat.final("\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in cells)]))


def little_story(rng: Random, chat: Chat, texts) -> Chat:
    (a, b), things = rng.sample(NAMES, 2), rng.sample(GOODS, 3)
    nouns = [e.word for e in rng.sample(texts.nouns, 2)]
    chat.user(f"{rng.choice(('Write', 'Tell', 'Make up'))} a short story with {a}, {b} and a {things[0]}.")
    chat.think(
        rng.choice(
            (
                "Two people, one object, a small turn.",
                "Keep it light.",
                f"{a} finds something; {b} helps.",
                "Begin, trouble, end.",
            )
        )
    )
    place = rng.choice(
        ("market", "river", "old mill", "station", "harbor", "school", "hill", "museum", "garden", "bakery")
    )
    mood = rng.choice(("glad", "puzzled", "tired", "proud", "curious", "late", "hungry", "calm"))
    lines = [
        rng.choice(
            (
                f"One {rng.choice(('cold', 'bright', 'quiet', 'rainy'))} morning {a} went to the {place} with "
                f"{_article(things[0])}.",
                f"{a} had lost {_article(things[0])} near the {place}.",
                f"At the {place}, {a} saw {_article(things[0])}.",
            )
        ),
        rng.choice(
            (
                f"There {sure(a)} met {sure(b)}, who was {mood} and carried {_article(things[1])}.",
                f"{sure(b)} came by, {mood} as ever, and asked about the {sure(things[0])}.",
            )
        ),
        rng.choice(
            (
                f'"It looks like {_article(nouns[0])}," said {sure(b)}.',
                f'"I would rather have {_article(nouns[1])}," {sure(a)} said.',
                f"They looked for {_article(nouns[0])} but found {_article(nouns[1])}.",
            )
        ),
        rng.choice(
            (
                f"In the end {sure(a)} and {sure(b)} shared the {sure(things[0])}.",
                f"So the {sure(things[0])} stayed with {sure(b)}.",
                f"{sure(a)} gave the {sure(things[0])} to {sure(b)} and went home "
                f"{rng.choice(('happy', 'singing', 'slowly'))}.",
            )
        ),
    ]
    return chat.final(" ".join(lines))


def word_facts(rng: Random, chat: Chat, texts) -> Chat:
    e = rng.choice(texts.entries)
    chat.user(
        f'{rng.choice(("Tell me about the letters of", "Analyse the spelling of", "Letter facts for"))} "{e.word}".'
    )
    vowels = sum(c in "aeiou" for c in e.word)
    chat.think(f"{'-'.join(e.word)}: {len(e.word)} letters, {vowels} vowels.")
    return chat.final(
        f'"{sure(e.word)}" has {sure(len(e.word))} letters ({sure(vowels)} vowels), begins with '
        f'"{sure(e.word[0])}" and ends with '
        f'"{sure(e.word[-1])}". Backwards it reads "{sure(e.word[::-1])}".'
    )


_WEIGHTS = {
    define: 12,
    reverse_lookup: 1,
    kind_of: 1,
    list_kinds: 1,
    compare: 1.5,
    example_sentence: 3,
    passage: 3,
    python_doc: 8,
    which_module: 1,
    doc_to_stub: 2,
    write_code: 5,
    rewrite: 3,
    make_table: 2,
    little_story: 2,
    word_facts: 1,
}


class Texts:
    """The entries that a split may use, with the subsets that single tasks draw from."""

    def __init__(self, entries: list, functions: list):
        self.entries, self.functions = entries, functions
        self.nouns = [e for e in entries if e.part == "noun" and e.kind_of]
        self.parents = [e for e in entries if e.part == "noun" and len(e.kinds) >= 2]
        self.with_examples = [e for e in entries if e.examples]
        self.with_signature = [f for f in functions if f.signature and inspect.cleandoc(f.doc) and '"' not in f.doc]


def make(rng: Random, chat: Chat, texts: Texts) -> Chat:
    """One conversation; half of them go on with a second question."""
    chat.maybe_closing(0.4)
    for _ in range(1 if rng.random() < 0.5 else 2):
        rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0](rng, chat, texts)
    return chat
