"""Generators of the ``reasoning_style`` pack: the analysis channel works a problem step by step, the final one answers.

Each function takes a random generator and a started ``Chat`` and adds the turns; ``sure`` marks copies of results that
the steps above have already fixed.
"""

import itertools
from datetime import date, timedelta
from math import gcd
from random import Random

from chat import Chat, sure
from phrases import remarks, thoughts

NAMES = (
    "Ana Ben Cleo Dan Eva Finn Gita Hugo Ines Jon Kira Liam Mona Nils Olga Pia Quinn Rosa Sami Tara Uma Viktor Wanda "
    "Xenia Yara Zeno Aron Bela Ciro Dora Emil Fay Gus Hana Ivo Jana Karl Lena Milo Nora"
).split()
GOODS = (
    "apple book candle drum egg flute glove hat jar kite lamp mug nail orange pencil quilt ribbon spoon towel "
    "umbrella vase whistle button brush carpet basket bucket chair cushion folder hammer kettle ladder magnet "
    "notebook paddle rope scarf ticket wallet"
).split()
_WORDS = (
    "anchor basil copper dolphin ember falcon granite harbor island jungle kernel lantern meadow nectar orchid "
    "pebble quartz raven saddle thunder urchin velvet walnut yonder zephyr acorn beacon canyon desert eclipse "
    "forest glacier hazel iron jasmine kelp lagoon marble needle olive prairie reef spruce timber violet willow "
    "amber bronze cedar dune elm fern grove heron ivy juniper"
).split()


def _open(rng: Random) -> str:
    return rng.choice(
        (
            "Let me work this out.",
            "Step by step.",
            "I start with what is given.",
            "First, the plan.",
            "Okay.",
            "We need to be careful here.",
            "This is a standard exercise.",
            "I will do it slowly and check at the end.",
            "The question is clear.",
            "Let us begin.",
            "Nothing tricky, but many digits.",
            "I'll write each step down.",
        )
    ) + (thoughts(rng, 2, 6) if rng.random() < 0.9 else "")


def _answer(rng: Random, value, what: str = "answer") -> str:
    value = sure(value)
    return rng.choice(
        (
            f"The {what} is **{value}**.",
            f"**{value}**.",
            f"Result: {value}.",
            f"It is {value}.",
            f"I get **{value}** as the {what}.",
            f"So the {what} is {value}.",
            f"Working it through gives {value}.",
        )
    ) + (remarks(rng, 2, 5) if rng.random() < 0.8 else "")


def _ask(rng: Random, body: str) -> str:
    lead = rng.choice(("", "", "", "Please help: ", "Quick question. ", "Homework: ", "I am stuck. ", "One more: "))
    tail = rng.choice(("", "", "", " Show the steps.", " Thanks!", " Just the answer, please.", " Explain briefly."))
    return lead + body + tail


def addition(rng: Random, chat: Chat) -> Chat:
    a, b = (rng.randint(100, 10 ** rng.randint(3, 6)) for _ in range(2))
    chat.user(_ask(rng, rng.choice((f"What is {a} + {b}?", f"Add {a} and {b}.", f"Find the sum of {a} and {b}."))))
    steps, carry = [_open(rng), "Add column by column from the right."], 0
    for place, (x, y) in enumerate(zip(f"{a:07d}"[::-1], f"{b:07d}"[::-1], strict=True)):
        if place >= len(str(max(a, b))) and not carry:
            break
        total = int(x) + int(y) + carry
        steps.append(f"{x} + {y} + {carry} = {total}: write {sure(total % 10)}, carry {sure(total // 10)}.")
        carry = total // 10
    steps.append(f"Reading upwards: {a} + {b} = {a + b}.")
    return chat.think("\n".join(steps)).final(_answer(rng, a + b, "sum"))


def subtraction(rng: Random, chat: Chat) -> Chat:
    a, b = sorted((rng.randint(100, 99999), rng.randint(10, 9999)), reverse=True)
    chat.user(_ask(rng, rng.choice((f"Compute {a} - {b}.", f"Take {b} away from {a}.", f"What is {a} minus {b}?"))))
    steps, rest = [_open(rng), f"I take {b} away in parts."], a
    for place, digit in enumerate(str(b)):
        part = int(digit) * 10 ** (len(str(b)) - 1 - place)
        if part:
            steps.append(f"{rest} - {part} = {rest - part}")
            rest -= part
    steps.append(f"Check: {sure(rest)} + {sure(b)} = {sure(a)}. Good.")
    return chat.think("\n".join(steps)).final(_answer(rng, rest, "difference"))


def multiplication(rng: Random, chat: Chat) -> Chat:
    a, b = rng.randint(12, 999), rng.randint(12, 999)
    chat.user(
        _ask(rng, rng.choice((f"Multiply {a} by {b}.", f"What is {a} * {b}?", f"Find the product of {a} and {b}.")))
    )
    parts = [int(d) * 10 ** (len(str(b)) - 1 - i) for i, d in enumerate(str(b)) if d != "0"]
    steps = [_open(rng), f"Split {b} into {' + '.join(map(str, parts))}."]
    steps += [f"{a} * {part} = {a * part}" for part in parts]
    total = 0
    for part in parts:
        steps.append(f"{total} + {sure(a * part)} = {total + a * part}")
        total += a * part
    return chat.think("\n".join(steps)).final(_answer(rng, total, "product"))


def long_division(rng: Random, chat: Chat) -> Chat:
    a, b = rng.randint(1000, 99999), rng.randint(3, 29)
    chat.user(
        _ask(rng, rng.choice((f"Divide {a} by {b} with remainder.", f"What are quotient and remainder of {a} / {b}?")))
    )
    steps, rest = [_open(rng), "Bring down one digit at a time."], 0
    for digit in str(a):
        now = rest * 10 + int(digit)
        q, rest = divmod(now, b)
        steps.append(f"{now} / {b}: {q} times ({q * b}), rest {rest}.")
    steps.append(f"Check: {b} * {a // b} + {sure(a % b)} = {sure(a)}.")
    final = rng.choice(
        ("Quotient {}, remainder {}.", "{} remainder {}.", "The quotient is {} and the remainder is {}.")
    )
    return chat.think("\n".join(steps)).final(final.format(sure(a // b), sure(a % b)))


def linear_equation(rng: Random, chat: Chat) -> Chat:
    a, x, b = rng.randint(2, 25), rng.randint(-40, 60), rng.randint(1, 99)
    name, c = rng.choice("xyzntk"), a * x + b
    chat.user(_ask(rng, f"{rng.choice(('Solve', 'Find ' + name + ' in', 'What solves'))} {a}{name} + {b} = {c}."))
    steps = [
        _open(rng),
        f"Subtract {b} from both sides: {a}{name} = {c} - {b} = {c - b}.",
        f"Divide by {a}: {name} = {sure(c - b)} / {sure(a)} = {x}.",
        f"Check: {a} * {x} + {b} = {a * x} + {sure(b)} = {sure(c)}.",
    ]
    return chat.think("\n".join(steps)).final(
        rng.choice((f"{name} = {sure(x)}", f"**{name} = {sure(x)}**", f"The solution is {name} = {sure(x)}."))
    )


def two_equations(rng: Random, chat: Chat) -> Chat:
    x, y, a, b = rng.randint(1, 40), rng.randint(1, 40), rng.randint(2, 9), rng.randint(2, 9)
    s, t = x + y, a * x + b * y
    if a == b:
        a += 1
        t = a * x + b * y
    chat.user(_ask(rng, f"Solve the system x + y = {s}, {a}x + {b}y = {t}."))
    steps = [
        _open(rng),
        f"From the first: y = {s} - x.",
        f"Insert: {a}x + {b} * ({s} - x) = {t}.",
        f"So {a - b}x + {b * s} = {t}, hence {a - b}x = {t - b * s} and x = {x}.",
        f"Then y = {s} - {sure(x)} = {y}.",
        f"Check: {a} * {sure(x)} + {b} * {sure(y)} = {a * x} + {b * y} = {sure(t)}.",
    ]
    return chat.think("\n".join(steps)).final(f"x = {sure(x)}, y = {sure(y)}")


def sequence(rng: Random, chat: Chat) -> Chat:
    start, step, count = rng.randint(-20, 60), rng.choice((-1, 1)) * rng.randint(2, 19), rng.randint(3, 5)
    terms, square = [start + i * step for i in range(count)], rng.random() < 0.4
    if square:
        terms = [start + i * step + i * i for i in range(count + 1)]
    following = start + len(terms) * step + (len(terms) ** 2 if square else 0)
    shown = ", ".join(map(str, terms))
    chat.user(
        _ask(
            rng,
            rng.choice((f"What comes next: {shown}?", f"Continue the sequence {shown}, ...", f"Next term of {shown}?")),
        )
    )
    gaps = [b - a for a, b in itertools.pairwise(terms)]
    steps = [_open(rng), "Differences: " + ", ".join(map(str, gaps)) + "."]
    if square:
        steps.append("They grow by 2 each time, so the next difference is " + f"{gaps[-1] + 2}.")
    else:
        steps.append(f"They are all {sure(step)}.")
    steps.append(f"{sure(terms[-1])} + {sure(following - terms[-1])} = {following}")
    return chat.think("\n".join(steps)).final(_answer(rng, following, "next term"))


def sort_numbers(rng: Random, chat: Chat) -> Chat:
    numbers = [rng.randint(-50, 999) for _ in range(rng.randint(4, 8))]
    up = rng.random() < 0.7
    order = "ascending" if up else "descending"
    chat.user(_ask(rng, f"{rng.choice(('Sort', 'Order', 'Arrange'))} {', '.join(map(str, numbers))} in {order} order."))
    steps, done = [_open(rng), "Insert one number after the other."], []
    for number in numbers:
        done = sorted([*done, number], reverse=not up)
        steps.append(f"{number}: [{', '.join(map(str, done))}]")
    return chat.think("\n".join(steps)).final(", ".join(sure(n) for n in done))


def sort_words(rng: Random, chat: Chat) -> Chat:
    words = rng.sample(_WORDS, rng.randint(4, 9))
    chat.user(
        _ask(
            rng, f"{rng.choice(('Put in alphabetical order', 'Sort these words', 'Alphabetise'))}: {', '.join(words)}."
        )
    )
    steps, rest = [_open(rng), "Pick the first of those left, again and again."], list(words)
    while rest:
        first = min(rest)
        rest.remove(first)
        steps.append(f"{first} (left: {', '.join(rest) or 'none'})")
    return chat.think("\n".join(steps)).final(", ".join(sure(w) for w in sorted(words)))


def to_base(rng: Random, chat: Chat) -> Chat:
    base, n = rng.choice((2, 2, 3, 5, 8, 16)), rng.randint(20, 2000)
    chat.user(_ask(rng, rng.choice((f"Write {n} in base {base}.", f"Convert the decimal number {n} to base {base}."))))
    steps, rest, digits = [_open(rng), f"Divide by {base} until nothing is left."], n, ""
    while rest:
        q, r = divmod(rest, base)
        steps.append(f"{rest} = {base} * {q} + {r}" + (f" ({'0123456789ABCDEF'[r]})" if base == 16 else ""))
        digits, rest = "0123456789ABCDEF"[r] + digits, q
    steps.append(f"Remainders from the last to the first: {digits}")
    return chat.think("\n".join(steps)).final(_answer(rng, digits, f"base {base} form"))


def from_base(rng: Random, chat: Chat) -> Chat:
    base = rng.choice((2, 2, 2, 4, 8))
    digits = str(rng.randint(1, base - 1)) + "".join(
        str(rng.randrange(base)) for _ in range(rng.randint(2, 9 if base == 2 else 4))
    )
    chat.user(
        _ask(
            rng,
            rng.choice(
                (f"What is {digits} (base {base}) in decimal?", f"Convert {digits} from base {base} to decimal.")
            ),
        )
    )
    steps, value = [_open(rng), f"Double-and-add style: times {base}, plus the next digit."], 0
    for digit in digits:
        steps.append(f"{value} * {base} + {digit} = {value * base + int(digit)}")
        value = value * base + int(digit)
    return chat.think("\n".join(steps)).final(_answer(rng, value, "decimal value"))


def date_shift(rng: Random, chat: Chat) -> Chat:
    day, shift = date(rng.randint(1990, 2039), rng.randint(1, 12), rng.randint(1, 28)), rng.randint(5, 120)
    end, now, left = day + timedelta(shift), day, shift
    chat.user(
        _ask(
            rng,
            rng.choice(
                (f"Which date is {shift} days after {day}?", f"Start on {day}, wait {shift} days. What is the date?")
            ),
        )
    )
    steps = [_open(rng), "Go month by month."]
    while True:
        following = (now.replace(day=1) + timedelta(32)).replace(day=1)
        jump = (following - now).days
        if jump > left:
            break
        now, left = following, left - jump
        steps.append(f"{jump} days lead to {now}; {left} left.")
    steps.append(f"{now} plus {sure(left)} days is {end}.")
    return chat.think("\n".join(steps)).final(_answer(rng, end, "date"))


def weekday(rng: Random, chat: Chat) -> Chat:
    days = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
    start, shift = rng.randrange(7), rng.randint(8, 900)
    chat.user(
        _ask(
            rng,
            f"Today is {days[start]}. {rng.choice(('Which weekday is it in', 'What day will it be in'))} {shift} days?",
        )
    )
    steps = [_open(rng), f"{shift} = 7 * {shift // 7} + {shift % 7}, so only {sure(shift % 7)} matters."]
    steps += [f"{i}: {days[(start + i) % 7]}" for i in range(1, shift % 7 + 1)]
    return chat.think("\n".join(steps)).final(_answer(rng, days[(start + shift) % 7], "weekday"))


def clock(rng: Random, chat: Chat) -> Chat:
    h, m, dh, dm = rng.randrange(24), rng.randrange(60), rng.randint(0, 14), rng.randrange(1, 60)
    total = (h + dh) * 60 + m + dm
    thing = rng.choice(
        (
            "A train leaves",
            "A film starts",
            "The shift begins",
            "The oven is turned on",
            "A ferry departs",
            "A lesson starts",
        )
    )
    chat.user(_ask(rng, f"{thing} at {h:02d}:{m:02d} and it takes {dh} h {dm} min. When is the end?"))
    steps = [
        _open(rng),
        f"Minutes: {m} + {dm} = {m + dm}" + (f", that is 1 h and {m + dm - 60} min." if m + dm >= 60 else "."),
    ]
    hours = h + dh + (m + dm) // 60
    steps.append(
        f"Hours: {h} + {dh}"
        + (" + 1" if m + dm >= 60 else "")
        + f" = {hours}"
        + (f", minus 24 is {hours - 24}." if hours >= 24 else ".")
    )
    return chat.think("\n".join(steps)).final(_answer(rng, f"{total // 60 % 24:02d}:{total % 60:02d}", "time"))


def shopping(rng: Random, chat: Chat) -> Chat:
    who, goods = rng.choice(NAMES), rng.sample(GOODS, rng.randint(2, 4))
    lines = [(g, rng.randint(2, 12), rng.randint(2, 40)) for g in goods]
    total = sum(n * p for _, n, p in lines)
    paid = (total // 50 + 1) * 50
    bought = " and ".join(f"{n} {g}s at {p} coins each" for g, n, p in lines)
    chat.user(
        _ask(
            rng,
            f"{who} {rng.choice(('buys', 'orders', 'takes'))} {bought}, and pays with {paid} coins. How much change?",
        )
    )
    steps = [_open(rng)] + [f"{g}s: {n} * {p} = {n * p}" for g, n, p in lines]
    steps += [
        f"Total: {' + '.join(sure(n * p) for _, n, p in lines)} = {total}",
        f"Change: {paid} - {sure(total)} = {paid - total}",
    ]
    change = sure(paid - total)
    final = (
        f"{who} gets {change} coins back.",
        f"The change is **{change}** coins.",
        f"{who} spends {sure(total)} coins, so {change} come back.",
    )
    return chat.think("\n".join(steps)).final(rng.choice(final))


def travel(rng: Random, chat: Chat) -> Chat:
    speed, hours, who = rng.randint(12, 120), rng.randint(2, 14), rng.choice(NAMES)
    how = rng.choice(("cycles", "drives", "rides a bus", "sails", "travels by train", "skates"))
    far = speed * hours
    if rng.random() < 0.5:
        chat.user(_ask(rng, f"{who} {how} for {hours} hours at {speed} km/h. How far is that?"))
        steps = [_open(rng), "Distance is speed times time.", f"{speed} * {hours} = {far}"]
        return chat.think("\n".join(steps)).final(f"{who} covers **{sure(far)} km**.")
    chat.user(_ask(rng, f"{who} {how} {far} km at a steady {speed} km/h. How long does it take?"))
    steps = [
        _open(rng),
        "Time is distance over speed.",
        f"{far} / {speed} = {hours}",
        f"Check: {speed} * {sure(hours)} = {sure(far)}.",
    ]
    return chat.think("\n".join(steps)).final(f"It takes {who} **{sure(hours)} hours**.")


def percentage(rng: Random, chat: Chat) -> Chat:
    rate, price, thing = rng.randint(1, 19) * 5, rng.randint(1, 60) * 20, rng.choice(GOODS)
    cut = rate * price // 100
    up = rng.random() < 0.5
    verb = "raised" if up else "reduced"
    new = price + cut if up else price - cut
    chat.user(_ask(rng, f"The price of a {thing} is {verb} by {rate}% from {price}. What is the new price?"))
    steps = [
        _open(rng),
        f"1% of {price} is {price / 100:g}.",
        f"{rate}% is {rate} * {price / 100:g} = {cut}.",
        f"{price} {'+' if up else '-'} {sure(cut)} = {new}",
    ]
    return chat.think("\n".join(steps)).final(_answer(rng, new, "new price"))


def euclid(rng: Random, chat: Chat) -> Chat:
    common = rng.randint(1, 30)
    a, b = common * rng.randint(5, 60), common * rng.randint(5, 60)
    lcm = rng.random() < 0.3
    what = "least common multiple" if lcm else "greatest common divisor"
    chat.user(_ask(rng, f"{rng.choice(('Find', 'Compute', 'What is'))} the {what} of {a} and {b}."))
    steps, x, y = [_open(rng), "Euclid's algorithm."], max(a, b), min(a, b)
    while y:
        steps.append(f"{x} = {y} * {x // y} + {x % y}")
        x, y = y, x % y
    steps.append(f"The last divisor is {sure(x)}.")
    if lcm:
        steps.append(f"{a} / {sure(x)} = {a // x}, and {a // x} * {b} = {a // x * b}")
    return chat.think("\n".join(steps)).final(_answer(rng, a * b // gcd(a, b) if lcm else x, what))


def factorise(rng: Random, chat: Chat) -> Chat:
    n, rest, factors = rng.randint(30, 3000), 0, []
    chat.user(
        _ask(
            rng,
            rng.choice(
                (
                    f"Factor {n} into primes.",
                    f"What is the prime factorisation of {n}?",
                    f"Is {n} prime? If not, factor it.",
                )
            ),
        )
    )
    steps, rest, p = [_open(rng)], n, 2
    while p * p <= rest:
        if rest % p:
            p += 1
            continue
        steps.append(f"{rest} / {p} = {rest // p}")
        factors.append(p)
        rest //= p
    factors.append(rest)
    steps.append(f"{rest} has no divisor up to its root, so it is prime.")
    text = " * ".join(sure(f) for f in factors)
    return chat.think("\n".join(steps)).final(f"{n} = {text}" if len(factors) > 1 else f"{sure(n)} is prime.")


def fractions(rng: Random, chat: Chat) -> Chat:
    a, b, c, d = rng.randint(1, 12), rng.randint(2, 15), rng.randint(1, 12), rng.randint(2, 15)
    top, bottom = a * d + c * b, b * d
    common = gcd(top, bottom)
    chat.user(_ask(rng, rng.choice((f"Add {a}/{b} and {c}/{d}.", f"What is {a}/{b} + {c}/{d} in lowest terms?"))))
    steps = [
        _open(rng),
        f"Common denominator: {b} * {d} = {bottom}.",
        f"{a} * {d} = {a * d} and {c} * {b} = {c * b}.",
        f"{sure(a * d)} + {sure(c * b)} = {top}, so {top}/{sure(bottom)}.",
        f"gcd({top}, {bottom}) = {common}.",
        f"Reduced: {top // common}/{bottom // common}.",
    ]
    return chat.think("\n".join(steps)).final(_answer(rng, f"{top // common}/{bottom // common}"))


def statistics(rng: Random, chat: Chat) -> Chat:
    count = rng.choice((3, 5, 5, 7))
    data = [rng.randint(1, 99) for _ in range(count)]
    data[-1] += -sum(data) % count
    who = rng.choice(NAMES)
    listing = ", ".join(map(str, data))
    chat.user(
        _ask(
            rng,
            rng.choice((f"Mean and median of {listing}?", f"{who} measured {listing}. Give the mean and the median.")),
        )
    )
    steps, total = [_open(rng)], 0
    for number in data:
        steps.append(f"{total} + {number} = {total + number}")
        total += number
    steps += [
        f"Mean: {sure(total)} / {count} = {total // count}",
        f"Sorted: {', '.join(map(str, sorted(data)))}",
        f"The middle one is {sorted(data)[count // 2]}.",
    ]
    return chat.think("\n".join(steps)).final(f"Mean {sure(total // count)}, median {sure(sorted(data)[count // 2])}.")


def power_mod(rng: Random, chat: Chat) -> Chat:
    a, e, m = rng.randint(2, 30), rng.randint(3, 9), rng.randint(5, 60)
    chat.user(_ask(rng, rng.choice((f"What is {a}^{e} mod {m}?", f"Find the remainder of {a}^{e} divided by {m}."))))
    steps, value = [_open(rng), f"Multiply by {a} and reduce mod {m}."], a % m
    steps.append(f"power 1: {value}")
    for i in range(2, e + 1):
        steps.append(f"power {i}: {value} * {a} = {value * a}, mod {m} = {value * a % m}")
        value = value * a % m
    return chat.think("\n".join(steps)).final(_answer(rng, value, "remainder"))


def ordering(rng: Random, chat: Chat) -> Chat:
    people = rng.sample(NAMES, rng.randint(3, 6))
    more, most, least = rng.choice(
        (
            ("taller", "tallest", "shortest"),
            ("older", "oldest", "youngest"),
            ("faster", "fastest", "slowest"),
            ("richer", "richest", "poorest"),
        )
    )
    facts = [f"{a} is {more} than {b}." for a, b in itertools.pairwise(people)]
    rng.shuffle(facts)
    want_most = rng.random() < 0.5
    chat.user(_ask(rng, f"{' '.join(facts)} Who is the {most if want_most else least}?"))
    steps, links = [_open(rng), "Chain the facts."], people[:1]
    for person in people[1:]:
        links.append(person)
        steps.append(" > ".join(links))
    person = sure(people[0] if want_most else people[-1])
    steps.append(f"The {most} is {people[0]}, the {least} is {people[-1]}.")
    return chat.think("\n".join(steps)).final(f"{person} is the {most if want_most else least}.")


def letters(rng: Random, chat: Chat) -> Chat:
    word = rng.choice(_WORDS) + rng.choice(_WORDS)
    if rng.random() < 0.5:
        chat.user(_ask(rng, f'{rng.choice(("Reverse", "Spell backwards", "Write from right to left"))} "{word}".'))
        steps = [_open(rng), "Letters: " + " ".join(word), "Backwards: " + " ".join(word[::-1])]
        return chat.think("\n".join(steps)).final(f'"{sure(word[::-1])}"')
    letter = rng.choice(word)
    chat.user(_ask(rng, f'How {rng.choice(("often does", "many times does"))} "{letter}" occur in "{word}"?'))
    steps, seen = [_open(rng), f"Go through {word} letter by letter."], 0
    for c in word:
        seen += c == letter
        steps.append(f"{c} -> {seen}" if c == letter else f"{c}")
    return chat.think("\n".join(steps)).final(_answer(rng, seen, "count"))


def determinant(rng: Random, chat: Chat) -> Chat:
    a, b, c, d = (rng.randint(-12, 20) for _ in range(4))
    chat.user(
        _ask(
            rng,
            f"{rng.choice(('Determinant of', 'Compute det of', 'What is the determinant of'))} [[{a}, {b}], [{c}, "
            f"{d}]]?",
        )
    )
    steps = [
        _open(rng),
        "Main diagonal minus the other one.",
        f"{a} * {d} = {a * d}",
        f"{b} * {c} = {b * c}",
        f"{sure(a * d)} - ({sure(b * c)}) = {a * d - b * c}",
    ]
    return chat.think("\n".join(steps)).final(_answer(rng, a * d - b * c, "determinant"))


def roman(rng: Random, chat: Chat) -> Chat:
    table = (
        (1000, "M"),
        (900, "CM"),
        (500, "D"),
        (400, "CD"),
        (100, "C"),
        (90, "XC"),
        (50, "L"),
        (40, "XL"),
        (10, "X"),
        (9, "IX"),
        (5, "V"),
        (4, "IV"),
        (1, "I"),
    )
    n, text, rows = rng.randint(4, 2999), "", []
    rest = n
    for value, sign in table:
        while rest >= value:
            text, rest = text + sign, rest - value
            rows.append((value, sign, rest, text))
    if rng.random() < 0.5:
        chat.user(_ask(rng, f"Write {n} {rng.choice(('as a Roman numeral', 'in Roman numerals'))}."))
        steps = [f"{value} is {sign}; {rest} left. So far {sofar}" for value, sign, rest, sofar in rows]
        return chat.think("\n".join([_open(rng), *steps])).final(_answer(rng, text, "numeral"))
    chat.user(_ask(rng, f"Which number is {text} {rng.choice(('in decimal', 'as an ordinary number'))}?"))
    steps = [f"{sign} is {value}, total {n - rest}" for value, sign, rest, _ in rows]
    return chat.think("\n".join([_open(rng), *steps])).final(_answer(rng, n, "number"))


def trace(rng: Random, chat: Chat) -> Chat:
    x, y, rounds = rng.randint(0, 12), rng.randint(1, 9), rng.randint(2, 6)
    op, step = rng.choice(("+", "*", "-")), rng.randint(2, 5)
    code = f"x = {x}\ny = {y}\nfor i in range({rounds}):\n    x = x + y\n    y = y {op} {step}\nprint(x, y)"
    chat.user(
        _ask(
            rng,
            f"{rng.choice(('What does this print?', 'Trace this program.', 'Give the output.'))}\n"
            f"```python\n{code}\n```",
        )
    )
    steps = [_open(rng), f"Start: x = {x}, y = {y}."]
    for i in range(rounds):
        x, old = x + y, y
        y = {"+": y + step, "*": y * step, "-": y - step}[op]
        steps.append(f"i = {i}: x = {x}, y = {old} {op} {step} = {y}")
    return chat.think("\n".join(steps)).final(f"It prints `{sure(x)} {sure(y)}`.")


def logic(rng: Random, chat: Chat) -> Chat:
    names = rng.sample("pqrst", 3)
    values = {n: rng.random() < 0.5 for n in names}
    ops = [rng.choice(("and", "or")) for _ in range(2)]
    signs = [rng.choice(("", "not ")) for _ in range(3)]
    given = ", ".join(f"{n} = {v}" for n, v in values.items())
    first, second, third = (s + n for s, n in zip(signs, names, strict=True))
    chat.user(_ask(rng, f"Evaluate ({first} {ops[0]} {second}) {ops[1]} {third} for {given}."))
    a, b, c = (values[n] != bool(s) for s, n in zip(signs, names, strict=True))
    inner = (a and b) if ops[0] == "and" else (a or b)
    outer = (inner and c) if ops[1] == "and" else (inner or c)
    steps = [
        _open(rng),
        f"{first} is {a}, {second} is {b}.",
        f"{sure(a)} {ops[0]} {sure(b)} is {inner}.",
        f"{third} is {c}.",
        f"{sure(inner)} {ops[1]} {sure(c)} is {outer}.",
    ]
    return chat.think("\n".join(steps)).final(_answer(rng, outer, "value"))


def invent_problems(rng: Random, chat: Chat) -> Chat:
    count, kind = rng.randint(2, 6), rng.choice(("addition", "subtraction", "multiplication"))
    who = rng.choice(NAMES)
    chat.user(_ask(rng, f"{rng.choice(('Make', 'Write', 'Invent'))} {count} {kind} problems with solutions for {who}."))
    sign, lines = {"addition": "+", "subtraction": "-", "multiplication": "*"}[kind], []
    for i in range(count):
        a, b = sorted((rng.randint(2, 99), rng.randint(2, 30)), reverse=True)
        value = {"+": a + b, "-": a - b, "*": a * b}[sign]
        lines.append((i + 1, f"{a} {sign} {b}", value))
    chat.think(_open(rng) + "\n" + "\n".join(f"{q} = {v}" for _, q, v in lines))
    return chat.final("\n".join(f"{i}. {sure(q)} = {sure(v)}" for i, q, v in lines))


def share_out(rng: Random, chat: Chat) -> Chat:
    people, each, extra = rng.sample(NAMES, rng.randint(2, 4)), rng.randint(3, 40), rng.randint(0, 5)
    thing, count = rng.choice(GOODS), len(people)
    extra %= count
    total = each * count + extra
    chat.user(
        _ask(
            rng,
            f"{', '.join(people[:-1])} and {people[-1]} share {total} {thing}s equally. How many does each get, "
            "and how many are left?",
        )
    )
    steps = [_open(rng), f"There are {count} people.", f"{total} = {count} * {each} + {extra}"]
    return chat.think("\n".join(steps)).final(
        f"Each gets {sure(each)} {thing}s, and {sure(extra)} {'is' if extra == 1 else 'are'} left."
    )


TASKS = (
    addition,
    subtraction,
    multiplication,
    long_division,
    linear_equation,
    two_equations,
    sequence,
    sort_numbers,
    sort_words,
    to_base,
    from_base,
    date_shift,
    weekday,
    clock,
    shopping,
    travel,
    percentage,
    euclid,
    factorise,
    fractions,
    statistics,
    power_mod,
    ordering,
    letters,
    determinant,
    roman,
    trace,
    logic,
    invent_problems,
    share_out,
)


def make(rng: Random, chat: Chat, texts=None) -> Chat:
    """One conversation: a task, and in a quarter of them a second one as a follow-up."""
    chat.maybe_closing(0.4)
    rng.choice(TASKS)(rng, chat)
    if rng.random() < 0.25:
        rng.choice(TASKS)(rng, chat)
    return chat
