"""Small Python functions with varied names and forms, and examples of their use that were really run."""

from random import Random

# task, parameters drawn for examples, then bodies that do the same; {f} is the function's name, {x} {y} its arguments.
_SNIPPETS = (
    ("adds two numbers", "ii", ("    return {x} + {y}", "    total = {x} + {y}\n    return total")),
    (
        "returns the larger of two numbers",
        "ii",
        (
            "    return max({x}, {y})",
            "    if {x} > {y}:\n        return {x}\n    return {y}",
            "    return {x} if {x} >= {y} else {y}",
        ),
    ),
    (
        "sums the squares of a list",
        "l",
        (
            "    return sum(v * v for v in {x})",
            "    total = 0\n    for v in {x}:\n        total += v * v\n    return total",
        ),
    ),
    (
        "counts the even numbers in a list",
        "l",
        (
            "    return sum(v % 2 == 0 for v in {x})",
            "    count = 0\n    for v in {x}:\n        if v % 2 == 0:\n            count += 1\n    return count",
        ),
    ),
    (
        "reverses a string",
        "s",
        (
            "    return {x}[::-1]",
            "    return ''.join(reversed({x}))",
            "    out = ''\n    for c in {x}:\n        out = c + out\n    return out",
        ),
    ),
    (
        "tells whether a string is a palindrome",
        "p",
        (
            "    return {x} == {x}[::-1]",
            "    for i in range(len({x}) // 2):\n        if {x}[i] != {x}[-1 - i]:\n            return False\n   "
            " return True",
        ),
    ),
    (
        "counts the vowels of a string",
        "s",
        ("    return sum(c in 'aeiou' for c in {x})", "    return len([c for c in {x} if c in 'aeiou'])"),
    ),
    (
        "removes duplicates but keeps the order",
        "l",
        (
            "    return list(dict.fromkeys({x}))",
            "    seen = []\n    for v in {x}:\n        if v not in seen:\n            seen.append(v)\n    return seen",
        ),
    ),
    (
        "computes the factorial of a small number",
        "n",
        (
            "    result = 1\n    for i in range(2, {x} + 1):\n        result *= i\n    return result",
            "    return 1 if {x} < 2 else {x} * {f}({x} - 1)",
        ),
    ),
    (
        "gives the n-th Fibonacci number",
        "n",
        (
            "    a, b = 0, 1\n    for _ in range({x}):\n        a, b = b, a + b\n    return a",
            "    if {x} < 2:\n        return {x}\n    return {f}({x} - 1) + {f}({x} - 2)",
        ),
    ),
    (
        "tests whether a number is prime",
        "m",
        (
            "    return {x} > 1 and all({x} % d for d in range(2, int({x} ** 0.5) + 1))",
            "    if {x} < 2:\n        return False\n    d = 2\n    while d * d <= {x}:\n        if {x} % d == "
            "0:\n            return False\n        d += 1\n    return True",
        ),
    ),
    (
        "computes the greatest common divisor",
        "mm",
        (
            "    while {y}:\n        {x}, {y} = {y}, {x} % {y}\n    return {x}",
            "    return {x} if {y} == 0 else {f}({y}, {x} % {y})",
        ),
    ),
    (
        "adds the digits of a number",
        "m",
        (
            "    return sum(int(d) for d in str({x}))",
            "    total = 0\n    while {x}:\n        total += {x} % 10\n        {x} //= 10\n    return total",
        ),
    ),
    (
        "finds the longest word of a text",
        "t",
        (
            "    return max({x}.split(), key=len)",
            "    best = ''\n    for w in {x}.split():\n        if len(w) > len(best):\n            best = w\n    "
            "return best",
        ),
    ),
    (
        "counts the words of a text",
        "t",
        ("    return len({x}.split())", "    words = {x}.split()\n    return len(words)"),
    ),
    (
        "capitalizes each word of a text",
        "t",
        ("    return {x}.title()", "    return ' '.join(w.capitalize() for w in {x}.split())"),
    ),
    (
        "maps each word to its length",
        "t",
        (
            "    return {{w: len(w) for w in {x}.split()}}",
            "    out = {{}}\n    for w in {x}.split():\n        out[w] = len(w)\n    return out",
        ),
    ),
    (
        "keeps the items above a limit",
        "li",
        (
            "    return [v for v in {x} if v > {y}]",
            "    out = []\n    for v in {x}:\n        if v > {y}:\n            out.append(v)\n    return out",
            "    return list(filter(lambda v: v > {y}, {x}))",
        ),
    ),
    (
        "multiplies each item by a factor",
        "li",
        (
            "    return [v * {y} for v in {x}]",
            "    out = []\n    for v in {x}:\n        out.append(v * {y})\n    return out",
        ),
    ),
    (
        "splits a list into chunks",
        "ln",
        (
            "    return [{x}[i:i + {y}] for i in range(0, len({x}), {y})]",
            "    out = []\n    for i in range(0, len({x}), {y}):\n        out.append({x}[i:i + {y}])\n    return out",
        ),
    ),
    (
        "rotates a list to the left",
        "ln",
        (
            "    k = {y} % len({x})\n    return {x}[k:] + {x}[:k]",
            "    out = list({x})\n    for _ in range({y}):\n        out.append(out.pop(0))\n    return out",
        ),
    ),
    (
        "computes the running totals of a list",
        "l",
        (
            "    out, total = [], 0\n    for v in {x}:\n        total += v\n        out.append(total)\n    return out",
            "    return [sum({x}[:i + 1]) for i in range(len({x}))]",
        ),
    ),
    (
        "returns the differences of neighbours",
        "l",
        (
            "    return [b - a for a, b in zip({x}, {x}[1:])]",
            "    return [{x}[i + 1] - {x}[i] for i in range(len({x}) - 1)]",
        ),
    ),
    (
        "sorts a list by the last digit",
        "l",
        (
            "    return sorted({x}, key=lambda v: abs(v) % 10)",
            "    out = list({x})\n    out.sort(key=lambda v: abs(v) % 10)\n    return out",
        ),
    ),
    (
        "finds the index of the smallest item",
        "l",
        (
            "    return {x}.index(min({x}))",
            "    best = 0\n    for i, v in enumerate({x}):\n        if v < {x}[best]:\n            best = i\n    "
            "return best",
        ),
    ),
    (
        "converts Celsius to Fahrenheit",
        "i",
        ("    return {x} * 9 / 5 + 32", "    scaled = {x} * 1.8\n    return round(scaled + 32, 1)"),
    ),
    (
        "writes a number in binary",
        "m",
        (
            "    return bin({x})[2:]",
            "    return f'{{{x}:b}}'",
            "    out = ''\n    while {x}:\n        out = str({x} % 2) + out\n        {x} //= 2\n    return out or '0'",
        ),
    ),
    (
        "repeats a string with a separator",
        "sn",
        ("    return '-'.join([{x}] * {y})", "    parts = [{x} for _ in range({y})]\n    return '-'.join(parts)"),
    ),
    (
        "counts how often each letter occurs",
        "s",
        (
            "    return {{c: {x}.count(c) for c in sorted(set({x}))}}",
            "    out = {{}}\n    for c in sorted({x}):\n        out[c] = out.get(c, 0) + 1\n    return out",
        ),
    ),
    (
        "shifts the letters of a word",
        "sn",
        (
            "    return ''.join(chr((ord(c) - 97 + {y}) % 26 + 97) for c in {x})",
            "    out = ''\n    for c in {x}:\n        out += chr((ord(c) - 97 + {y}) % 26 + 97)\n    return out",
        ),
    ),
)
_HEADS = ("get", "make", "do", "compute", "my", "quick", "find", "simple", "calc", "run")
_STEMS = ("result", "value", "answer", "output", "item", "total", "thing", "helper", "step", "task", "data", "piece")
_ARGUMENTS = (
    ("x", "y"),
    ("a", "b"),
    ("first", "second"),
    ("value", "other"),
    ("data", "n"),
    ("items", "k"),
    ("arg", "size"),
)
_WORDS = (
    "level kayak civic window lantern radar marble rotor orange noon timber refer velvet apple stats river madam"
).split()
_compiled: dict[str, dict] = {}


def snippet(rng: Random) -> tuple[str, str, list[tuple[str, object]]]:
    """A task, a function that does it, and a few calls of that function with the values that they return."""
    task, kinds, bodies = rng.choice(_SNIPPETS)
    words = [w for w in task.split() if w.isalpha() and len(w) > 3]
    name = (
        f"{rng.choice(_HEADS)}_{rng.choice(_STEMS)}"
        if rng.random() < 0.4
        else "_".join(rng.sample(words, min(2, len(words))))
    )
    x, y = rng.choice(_ARGUMENTS)
    names = ", ".join((x, y)[: len(kinds)])
    body = rng.choice(bodies).format(f=name.lower(), x=x, y=y)
    doc = f'    """{task[0].upper()}{task[1:]}."""\n' if rng.random() < 0.5 else ""
    code = f"def {name.lower()}({names}):\n{doc}{body}"
    if code not in _compiled:
        _compiled[code] = scope = {}
        exec(code, scope)  # our own template, filled with our own names
    function = _compiled[code][name.lower()]
    runs = []
    for _ in range(rng.randint(1, 4)):
        arguments = [_argument(rng, kind) for kind in kinds]
        runs.append((f"{name.lower()}({', '.join(map(repr, arguments))})", function(*arguments)))
    return task, code, runs


def _argument(rng: Random, kind: str):
    if kind == "l":
        return [rng.randint(-9, 50) for _ in range(rng.randint(3, 7))]
    if kind in "sp":
        return rng.choice(_WORDS)
    if kind == "t":
        return " ".join(rng.sample(_WORDS, rng.randint(2, 5)))
    return rng.randint(*{"i": (-20, 99), "n": (1, 9), "m": (2, 400)}[kind])
