"""Generators of the ``tool_agentic`` pack: functions are declared, called with JSON arguments, and their results told.

A tool's result is drawn at random, so the tokens that copy it are certain, and the tool's own turn
(never scored) is not.
"""

import re
from random import Random

from chat import Chat, plain, sure
from phrases import remarks, thoughts
from reasoning_tasks import GOODS, NAMES

_CITIES = (
    "Lisbon Oslo Cairo Lima Quito Dakar Hanoi Osaka Perth Turin Ghent Porto Bergen Leeds Basel Graz Malmo Nantes "
    "Bilbao Krakow Riga Tartu Vilnius Sofia Izmir Pune Busan Cebu Davao Kyoto Recife Salta Cusco Merida Austin "
    "Denver Tucson Boise Halifax Calgary"
).split()
_SKIES = ("clear", "cloudy", "light rain", "heavy rain", "snow", "fog", "windy", "thunderstorm", "hail", "sunny spells")
_TOPICS = (
    "budget meeting roadmap invoice recipe garden travel survey inventory contract lesson workshop backup "
    "release training repair festival library music harvest"
).split()
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_ROOMS = ("kitchen", "hall", "office", "bedroom", "garage", "attic", "cellar", "studio", "porch", "library")


def _tools(chat: Chat, *signatures: str, note: str = "") -> Chat:
    body = "\n".join(f"type {s};" for s in signatures)
    return chat.developer(f"namespace functions {{\n{body}\n}}{note}", "Tools")


def _plan(rng: Random, tool: str, why: str) -> str:
    return rng.choice(
        (
            f"The user wants {why}. I should call {tool}.",
            f"I need {why}; {tool} can provide that.",
            f"To get {why}, use {tool}.",
            f"{tool} is the right function here, because the user asks for {why}.",
            f"Looking for {why}. One call to {tool} will do.",
            f"I cannot know {why} without looking it up, so {tool} comes first.",
            f"Plan: call {tool}, read the result, report {why}.",
            f"This calls for {tool}. Then I can tell the user {why}.",
        )
    ) + thoughts(rng, 2, 6)


def _do(rng: Random, tool: str, what: str) -> str:
    return rng.choice(
        (
            f"The user wants {what}. {tool} does that.",
            f"Use {tool} for {what}.",
            f"I create {what} with {tool}.",
            f"{tool} is made for this.",
            f"A clear order: {what}.",
        )
    ) + thoughts(rng, 2, 6)


def _read(rng: Random, fact: str) -> str:
    return rng.choice(
        (
            f"The result says {fact}.",
            f"Now I know: {fact}.",
            f"The tool returned {fact}.",
            f"Good, {fact}. Time to answer.",
            f"So {fact}. I report that.",
            f"Result received: {fact}. Nothing else is needed.",
        )
    )


def _tell(rng: Random, chat: Chat, text: str) -> Chat:
    """Answer; often the analysis drafts the answer first, so that the final channel copies it."""
    if rng.random() < 0.75:
        draft = rng.choice(("Draft:", "I will say:", "My answer:", "Now write:", "So I tell the user:", "Wording:"))
        chat.think(f"{draft} {text}{_after(text, thoughts(rng, 0, 4))}")
        text = "\n".join(" ".join(_copied(word) for word in line.split(" ")) for line in plain(text).split("\n"))
    closing = remarks(rng, 2, 5) if rng.random() < 0.9 else ""
    return chat.final(text + _after(text, closing))


def _after(text: str, sentences: str) -> str:
    """The sentences as they follow a text: on its line, or in a paragraph of their own after several lines."""
    if not sentences:
        return ""
    if "\n" in text:
        return f"\n\n{sentences.strip()}"
    return sentences if plain(text)[-1] in ".?!" or plain(text).endswith(".**") else f".{sentences}"


def _copied(word: str) -> str:
    """Mark a word, but not the signs around it."""
    return re.sub(r"[A-Za-z0-9]+(?:[-:/_.][A-Za-z0-9]+)*", lambda m: sure(m[0]), word)


def _polite(rng: Random, body: str) -> str:
    return (
        rng.choice(("", "", "Hi! ", "Hello. ", "Please help me. ", "Hey! "))
        + body
        + rng.choice(("", "", " Thanks.", " Thank you!"))
    )


def _code(rng: Random, letters: str = "ABCDEFGHKMNPRSTUVWXYZ") -> str:
    return f"{rng.choice(letters)}{rng.choice(letters)}-{rng.randint(1000, 99999)}"


def calculator(rng: Random, chat: Chat) -> Chat:
    a, b, c = rng.randint(10, 9999), rng.randint(10, 999), rng.randint(2, 99)
    op = rng.choice("+-*")
    text = f"{a} {op} {b} * {c}" if rng.random() < 0.5 else f"({a} {op} {b}) * {c}"
    value = eval(text)  # the text holds integers and operators only
    _tools(chat, "calculate = (_: {expression: string}) => number").user(
        _polite(rng, rng.choice((f"What is {text}?", f"Please compute {text}.")))
    )
    chat.think(_plan(rng, "calculate", f"the value of {text}")).call("calculate", expression=sure(text)).result(
        {"value": value}
    )
    if rng.random() < 0.5:
        chat.think(_read(rng, f"{text} = {sure(value)}"))
    return _tell(
        rng,
        chat,
        rng.choice(
            (f"{text} = {sure(value)}", f"The value of {text} is **{sure(value)}**.", f"That makes {sure(value)}.")
        ),
    )


def weather(rng: Random, chat: Chat) -> Chat:
    cities = rng.sample(_CITIES, rng.choice((1, 1, 2)))
    day = rng.choice(_DAYS)
    _tools(chat, "get_weather = (_: {city: string, day: string}) => object")
    where = " and ".join(cities)
    chat.user(
        _polite(
            rng,
            rng.choice(
                (
                    f"How is the weather in {where} on {day}?",
                    f"I need the {day} forecast for {where}.",
                    f"Will it be warm in {where} on {day}?",
                )
            ),
        )
    )
    chat.think(_plan(rng, "get_weather", f"the {day} forecast for {where}"))
    lines, warmth = [], {}
    for city in cities:
        sky, low = rng.choice(_SKIES), rng.randint(-12, 26)
        high, wind = low + rng.randint(2, 11), rng.randint(2, 70)
        warmth[city] = high
        chat.call("get_weather", city=sure(city), day=sure(day)).result(
            {"sky": sky, "low": low, "high": high, "wind_kmh": wind}
        )
        lines.append(
            rng.choice(
                (
                    f"{city} on {day}: {sure(sky)}, {sure(low)} to {sure(high)} degrees, wind {sure(wind)} km/h.",
                    f"On {day} expect {sure(sky)} in {sure(city)}, between {sure(low)} and {sure(high)} degrees.",
                )
            )
        )
    if len(cities) == 2:
        warmer = max(warmth, key=warmth.get)
        chat.think(f"{cities[0]} reaches {sure(warmth[cities[0]])}, {cities[1]} reaches {sure(warmth[cities[1]])}.")
        lines.append(
            f"{sure(warmer)} is at least as warm." if len(set(warmth.values())) == 1 else f"{sure(warmer)} is warmer."
        )
    elif rng.random() < 0.5:
        lines.append(
            rng.choice(
                ("Take a coat.", "Have a nice day outside.", "Enjoy the day.", "Plan for indoors if you prefer.")
            )
        )
    return _tell(rng, chat, "\n".join(lines))


def file_search(rng: Random, chat: Chat) -> Chat:
    topic, year = rng.choice(_TOPICS), rng.randint(2012, 2026)
    paths = [
        f"/{rng.choice(_ROOMS)}/{topic}_{rng.choice(GOODS)}_{rng.randint(1, 99)}.txt" for _ in range(rng.randint(1, 4))
    ]
    _tools(
        chat,
        "search_files = (_: {query: string, year: number}) => string[]",
        "read_file = (_: {path: string}) => string",
    )
    chat.user(
        _polite(
            rng,
            rng.choice(
                (
                    f"Find my {topic} notes from {year} and tell me the total.",
                    f"Which total is in the {topic} file of {year}?",
                )
            ),
        )
    )
    chat.think(_plan(rng, "search_files", f"files about {topic} from {year}"))
    chat.call("search_files", query=sure(topic), year=sure(year)).result(paths)
    total, owner = rng.randint(100, 99999), rng.choice(NAMES)
    noun = "file" if len(paths) == 1 else "files"
    chat.think(
        f"{len(paths)} {noun} found. "
        f"{rng.choice(('The first one looks right', 'I read the first', 'Open the first one'))}: {sure(paths[0])}."
    )
    chat.call("read_file", path=sure(paths[0])).result(f"{topic} {year}\nowner: {owner}\ntotal: {total}")
    return _tell(
        rng,
        chat,
        rng.choice(
            (
                f"`{sure(paths[0])}` gives a total of **{sure(total)}** (owner: {sure(owner)}).",
                f"The total is {sure(total)}, noted by {sure(owner)} in `{sure(paths[0])}`.",
            )
        ),
    )


def units(rng: Random, chat: Chat) -> Chat:
    source, target, rate = rng.choice(
        (
            ("km", "m", 1000),
            ("kg", "g", 1000),
            ("h", "min", 60),
            ("m", "cm", 100),
            ("day", "h", 24),
            ("ft", "in", 12),
            ("lb", "oz", 16),
            ("week", "day", 7),
            ("min", "s", 60),
            ("l", "ml", 1000),
        )
    )
    value = rng.randint(2, 900)
    _tools(chat, "convert = (_: {value: number, from: string, to: string}) => number")
    chat.user(
        _polite(rng, rng.choice((f"How many {target} are {value} {source}?", f"Convert {value} {source} to {target}.")))
    )
    chat.think(_plan(rng, "convert", f"{value} {source} in {target}"))
    chat.call("convert", **{"value": sure(value), "from": sure(source), "to": sure(target)}).result(
        {"value": value * rate}
    )
    return _tell(
        rng,
        chat,
        rng.choice(
            (f"{value} {source} are **{sure(value * rate)} {target}**.", f"That is {sure(value * rate)} {target}.")
        ),
    )


def calendar(rng: Random, chat: Chat) -> Chat:
    day, who, topic = rng.choice(_DAYS), rng.choice(NAMES), rng.choice(_TOPICS)
    hours = sorted(rng.sample(range(8, 18), rng.randint(1, 3)))
    events = [{"start": f"{h:02d}:00", "title": f"{rng.choice(_TOPICS)} with {rng.choice(NAMES)}"} for h in hours]
    free = next(h for h in range(8, 19) if h not in hours)
    _tools(
        chat,
        "list_events = (_: {day: string}) => object[]",
        "create_event = (_: {day: string, start: string, title: string}) => string",
    )
    chat.user(
        _polite(
            rng,
            f"{rng.choice(('Book', 'Schedule', 'Set up'))} a {topic} talk with {who} on {day}, at the first free "
            "hour from 08:00.",
        )
    )
    chat.think(_plan(rng, "list_events", f"what is on {day}")).call("list_events", day=sure(day)).result(events)
    taken = ", ".join(sure(e["start"]) for e in events)
    chat.think(f"Taken: {taken}. The first free hour is {free:02d}:00.")
    event = _code(rng)
    chat.call(
        "create_event", day=sure(day), start=sure(f"{free:02d}:00"), title=f"{sure(topic)} with {sure(who)}"
    ).result({"id": event})
    return _tell(
        rng,
        chat,
        rng.choice(
            (
                f"Done: {topic} with {sure(who)}, {day} at {sure(f'{free:02d}:00')} (event {sure(event)}).",
                f"Your talk with {sure(who)} is on {sure(day)} at {sure(f'{free:02d}:00')}. The event ID is "
                f"{sure(event)}.",
            )
        ),
    )


def inventory(rng: Random, chat: Chat) -> Chat:
    thing, want, stock, price = rng.choice(GOODS), rng.randint(2, 60), rng.randint(0, 120), rng.randint(2, 90)
    sku = _code(rng)
    _tools(
        chat, "check_stock = (_: {item: string}) => object", "place_order = (_: {sku: string, count: number}) => object"
    )
    chat.user(
        _polite(
            rng, f"{rng.choice(('I need', 'Order', 'Please get me'))} {want} {thing}s, if there are enough in stock."
        )
    )
    chat.think(_plan(rng, "check_stock", f"the stock of {thing}s"))
    chat.call("check_stock", item=sure(thing)).result({"sku": sku, "stock": stock, "price": price})
    if stock < want:
        chat.think(f"Only {sure(stock)} in stock, fewer than {sure(want)}. I must not order.")
        return _tell(
            rng,
            chat,
            f"Sorry, only {sure(stock)} {thing}s are left, so I did not order {sure(want)}. "
            + rng.choice(("Shall I order fewer?", "Do you want those instead?", "I can watch the stock for you.")),
        )
    chat.think(f"{sure(stock)} in stock, at least {sure(want)}. Order. The cost is {want} * {price} = {want * price}.")
    order = _code(rng)
    chat.call("place_order", sku=sure(sku), count=sure(want)).result({"order": order, "status": "accepted"})
    return _tell(
        rng,
        chat,
        rng.choice(
            (
                f"Ordered {sure(want)} {thing}s for {sure(want * price)} in all. Order number: {sure(order)}.",
                f"Your order {sure(order)} is accepted: {sure(want)} {sure(thing)}s, total {sure(want * price)}.",
            )
        ),
    )


def money(rng: Random, chat: Chat) -> Chat:
    a, b = rng.sample(("EUR", "USD", "JPY", "CHF", "NOK", "INR", "BRL", "KRW", "PLN", "CAD"), 2)
    amount, rate = rng.randint(2, 99) * 10, rng.randint(2, 40)
    _tools(chat, "exchange_rate = (_: {from: string, to: string}) => number")
    chat.user(_polite(rng, f"{rng.choice(('How much is', 'What is', 'What do I get for'))} {amount} {a} in {b}?"))
    chat.think(_plan(rng, "exchange_rate", f"the rate from {a} to {b}"))
    chat.call("exchange_rate", **{"from": sure(a), "to": sure(b)}).result({"rate": rate})
    chat.think(f"{amount} * {sure(rate)} = {amount * rate}")
    return _tell(rng, chat, f"At a rate of {sure(rate)}, {amount} {sure(a)} are **{sure(amount * rate)} {sure(b)}**.")


def dictionary(rng: Random, chat: Chat, texts) -> Chat:
    entry = rng.choice(texts.entries)
    _tools(chat, "define = (_: {word: string}) => object")
    chat.user(
        _polite(
            rng, rng.choice((f'Look up "{entry.word}" for me.', f'What does the dictionary say about "{entry.word}"?'))
        )
    )
    chat.think(_plan(rng, "define", f'the meaning of "{entry.word}"'))
    chat.call("define", word=sure(entry.word)).result(
        {"part": entry.part, "text": entry.gloss, "also": list(entry.synonyms)}
    )
    also = f" Also: {', '.join(sure(s) for s in entry.synonyms)}." if entry.synonyms else ""
    first, *rest = entry.gloss.split(" ", 1)
    return _tell(rng, chat, f"**{entry.word}** ({sure(entry.part)}): {first} {sure(rest[0]) if rest else ''}.{also}")


def reminder(rng: Random, chat: Chat) -> Chat:
    thing, day, hour, ident = rng.choice(GOODS), rng.choice(_DAYS), rng.randint(6, 22), rng.randint(100, 9999)
    minute = rng.choice((0, 5, 10, 15, 20, 30, 40, 45, 50))
    task = rng.choice(
        (f"buy a {thing}", f"call {rng.choice(NAMES)}", f"return the {thing}", f"water the {rng.choice(_ROOMS)} plants")
    )
    time = f"{hour:02d}:{minute:02d}"
    _tools(chat, "set_reminder = (_: {text: string, day: string, time: string}) => number")
    chat.user(
        _polite(
            rng,
            rng.choice(
                (f"Remind me on {day} at {time} to {task}.", f"On {day} at {time} I have to {task}. Set a reminder.")
            ),
        )
    )
    chat.think(_do(rng, "set_reminder", "a reminder"))
    chat.call("set_reminder", text=sure(task), day=sure(day), time=sure(time)).result({"id": ident})
    return _tell(
        rng,
        chat,
        rng.choice(
            (
                f"Reminder {sure(ident)} is set: {sure(task)}, {sure(day)} at {sure(time)}.",
                f"I will remind you on {sure(day)} at {sure(time)} to {sure(task)} (number {sure(ident)}).",
            )
        ),
    )


def trains(rng: Random, chat: Chat) -> Chat:
    a, b = rng.sample(_CITIES, 2)
    rides = []
    for _ in range(rng.randint(2, 4)):
        start, long = rng.randint(300, 1200), rng.randint(35, 230)
        rides.append(
            {"train": f"{rng.choice(('IC', 'RE', 'EX'))} {rng.randint(10, 999)}", "start": start, "minutes": long}
        )
    rides.sort(key=lambda ride: ride["start"])
    shown = [{**r, "start": f"{r['start'] // 60:02d}:{r['start'] % 60:02d}"} for r in rides]
    _tools(chat, "find_trains = (_: {from: string, to: string}) => object[]")
    chat.user(
        _polite(
            rng,
            rng.choice(("Which is the fastest train", "What is the fastest connection", "Which train is quickest"))
            + f" from {a} to {b}?",
        )
    )
    chat.think(_plan(rng, "find_trains", f"the trains from {a} to {b}"))
    chat.call("find_trains", **{"from": sure(a), "to": sure(b)}).result(shown)
    best = min(shown, key=lambda ride: ride["minutes"])
    chat.think(
        "Durations: "
        + ", ".join(f"{r['train']} {sure(r['minutes'])}" for r in shown)
        + f". The least is {best['minutes']}."
    )
    return _tell(
        rng, chat, f"Take **{sure(best['train'])}** at {sure(best['start'])}; it needs {sure(best['minutes'])} minutes."
    )


def database(rng: Random, chat: Chat) -> Chat:
    table, column = rng.choice(
        (("orders", "amount"), ("visits", "minutes"), ("parts", "weight"), ("books", "pages"), ("trees", "height"))
    )
    group = rng.choice(("city", "owner", "month"))
    values = rng.sample(
        _CITIES
        if group == "city"
        else NAMES
        if group == "owner"
        else ["January", "March", "May", "June", "August", "October"],
        rng.randint(2, 4),
    )
    func, word = rng.choice(
        (("SUM", "total"), ("MAX", "largest"), ("MIN", "smallest"), ("COUNT", "number of"), ("AVG", "average"))
    )
    what = table if func == "COUNT" else column
    sql = f"SELECT {group}, {func}({column}) FROM {table} GROUP BY {group}"
    _tools(
        chat,
        "run_sql = (_: {query: string}) => object[]",
        note=f"\nTable: {table}(id, {group}, {column})",
    )
    chat.user(
        _polite(rng, f"{rng.choice(('Show', 'Give me', 'I need'))} the {word} {what} by {group} in the {table} table.")
    )
    chat.think(_plan(rng, "run_sql", f"the {word} {what} for each {group}"))
    rows = [[v, rng.randint(1, 9999)] for v in values]
    chat.call("run_sql", query=sure(sql)).result(rows)
    lines = [f"| {sure(v)} | {sure(n)} |" for v, n in rows]
    return _tell(rng, chat, f"| {group} | {word} {what} |\n|---|---|\n" + "\n".join(lines))


def todo(rng: Random, chat: Chat) -> Chat:
    verbs = ("paint", "repair", "sell", "wash", "pack", "find", "wrap", "move", "check", "clean", "return", "label")
    tasks = [f"{rng.choice(verbs)} the {g}" for g in rng.sample(GOODS, rng.randint(2, 5))]
    first = rng.randint(10, 900)
    _tools(chat, "add_task = (_: {text: string}) => number", "list_tasks = () => object[]")
    chat.user(
        _polite(rng, f"{rng.choice(('Put', 'Add', 'Write'))} {', '.join(tasks[:-1])} and {tasks[-1]} on my list.")
    )
    chat.think(_do(rng, "add_task", f"{len(tasks)} new tasks"))
    for i, task in enumerate(tasks):
        chat.call("add_task", text=sure(task)).result({"id": first + i})
    return _tell(
        rng,
        chat,
        f"Added {len(tasks)} tasks:\n" + "\n".join(f"- {sure(first + i)}: {sure(t)}" for i, t in enumerate(tasks)),
    )


def logs(rng: Random, chat: Chat) -> Chat:
    service = f"{rng.choice(_TOPICS)}-{rng.choice(('api', 'worker', 'db', 'cache', 'web'))}"
    code, count, request = rng.choice((400, 403, 404, 408, 429, 500, 502, 503)), rng.randint(2, 400), _code(rng)
    cause = rng.choice(
        ("disk full", "timeout", "bad token", "missing field", "too many requests", "lost connection", "unknown host")
    )
    _tools(chat, "search_logs = (_: {service: string, level: string}) => object")
    chat.user(
        _polite(
            rng,
            f"{rng.choice(('What is wrong with', 'Which errors come from', 'Any errors in'))} {service}?",
        )
    )
    chat.think(_plan(rng, "search_logs", f"the errors of {service}"))
    chat.call("search_logs", service=sure(service), level="error").result(
        {"count": count, "last": {"code": code, "cause": cause, "request": request}}
    )
    chat.think(_read(rng, f"{sure(count)} errors, the last with code {sure(code)}"))
    advice = {
        "disk full": "Free some space",
        "timeout": "Raise the limit",
        "bad token": "Renew the token",
        "missing field": "Check the client",
        "too many requests": "Slow the client down",
        "lost connection": "Check the network",
        "unknown host": "Check the name",
    }
    return _tell(
        rng,
        chat,
        f"{service} logged {sure(count)} errors. The last one, request {sure(request)}, failed with "
        f"{sure(code)}: {sure(cause)}. {sure(advice[cause])}.",
    )


def home(rng: Random, chat: Chat) -> Chat:
    room, old, new = rng.choice(_ROOMS), rng.randint(12, 27), rng.randint(14, 26)
    _tools(
        chat,
        "get_temperature = (_: {room: string}) => number",
        "set_temperature = (_: {room: string, degrees: number}) => string",
    )
    limit = rng.randint(16, 23)
    chat.user(_polite(rng, f"If the {room} is below {limit} degrees, set it to {new + 4}."))
    chat.think(_plan(rng, "get_temperature", f"the temperature in the {room}"))
    chat.call("get_temperature", room=sure(room)).result({"degrees": old})
    if old >= limit:
        chat.think(f"{sure(old)} is not below {sure(limit)}. Nothing to do.")
        return _tell(rng, chat, f"The {sure(room)} has {sure(old)} degrees already, so I left it as it is.")
    chat.think(f"{sure(old)} is below {sure(limit)}. Set it to {sure(new + 4)}.")
    chat.call("set_temperature", room=sure(room), degrees=sure(new + 4)).result("ok")
    return _tell(rng, chat, f"The {sure(room)} had {sure(old)} degrees; it is now set to {sure(new + 4)}.")


def parcel(rng: Random, chat: Chat) -> Chat:
    code, city, day = _code(rng), rng.choice(_CITIES), rng.choice(_DAYS)
    state = rng.choice(("in transit", "at the depot", "out for delivery", "held at customs", "delivered"))
    _tools(chat, "track = (_: {parcel: string}) => object")
    chat.user(_polite(rng, rng.choice((f"Where is parcel {code}?", f"Track {code}, please.", f"Has {code} arrived?"))))
    if rng.random() < 0.4:
        chat.say(
            rng.choice(
                ("I will look that up.", "One moment, I check the tracking.", "Let me ask the tracking service.")
            )
        )
    chat.think(_plan(rng, "track", f"the state of parcel {code}"))
    if rng.random() < 0.25:
        chat.call("track", parcel=sure(code)).result({"error": "busy, try again"})
        chat.think(
            rng.choice(
                ("The service was busy. Try once more.", "Busy; I repeat the call.", "That failed for now, so retry.")
            )
        )
    chat.call("track", parcel=sure(code)).result({"state": state, "place": city, "expected": day})
    return _tell(
        rng,
        chat,
        rng.choice(
            (
                f"Parcel {sure(code)} is {sure(state)} in {sure(city)}, expected on {sure(day)}.",
                f"{sure(code)}: {sure(state)}, {sure(city)}. Expected day: {sure(day)}.",
            )
        ),
    )


def contacts(rng: Random, chat: Chat) -> Chat:
    who, number, city = rng.choice(NAMES), f"0{rng.randint(10, 99)}-{rng.randint(10000, 99999)}", rng.choice(_CITIES)
    state = rng.choice(("ready", "late", "done", "cancelled"))
    subject, message = rng.choice(_TOPICS), _code(rng)
    _tools(
        chat,
        "find_contact = (_: {name: string}) => object",
        "send_message = (_: {number: string, text: string}) => string",
    )
    chat.user(
        _polite(
            rng,
            f"{rng.choice(('Tell', 'Write to', 'Text'))} {who} that the {subject} is "
            f"{rng.choice(('ready', 'late', 'done', 'cancelled'))}.",
        )
    )
    state = chat.marked.rsplit("is ", 1)[1].split(".")[0]
    chat.think(_plan(rng, "find_contact", f"the number of {who}")).call("find_contact", name=sure(who)).result(
        {"number": number, "city": city}
    )
    text = f"Hello {who}, the {subject} is {state}."
    chat.call("send_message", number=sure(number), text=sure(text)).result({"message": message})
    return _tell(rng, chat, f'Sent to {sure(who)} ({sure(number)}): "{sure(text)}" Message ID {sure(message)}.')


def no_tool(rng: Random, chat: Chat) -> Chat:
    a, b = rng.randint(2, 20), rng.randint(2, 20)
    _tools(chat, "get_weather = (_: {city: string, day: string}) => object", "track = (_: {parcel: string}) => object")
    chat.user(_polite(rng, rng.choice((f"What is {a} plus {b}?", f"Add {a} and {b}."))))
    chat.think(
        rng.choice(
            (
                "No function is needed for this.",
                "None of the tools fits; I can do it myself.",
                "Simple enough without tools.",
            )
        )
    )
    return _tell(rng, chat, f"{a} + {b} = {sure(a + b)}")


def recipe(rng: Random, chat: Chat) -> Chat:
    dish = rng.choice(("pancakes", "soup", "bread", "salad", "curry", "cake", "stew", "noodles"))
    base, factor = rng.choice((2, 3, 4)), rng.randint(2, 5)
    parts = rng.sample(
        ("flour", "milk", "butter", "sugar", "rice", "beans", "carrots", "onions", "oil", "water"), rng.randint(2, 4)
    )
    amounts = {p: rng.randint(1, 60) * 5 for p in parts}
    _tools(chat, "get_recipe = (_: {dish: string}) => object")
    chat.user(
        _polite(
            rng,
            f"{rng.choice(('What do I need for', 'How much of everything goes into'))} {dish} for {base * factor} "
            "people?",
        )
    )
    chat.think(_plan(rng, "get_recipe", f"the recipe for {dish}"))
    chat.call("get_recipe", dish=sure(dish)).result({"serves": base, "grams": amounts})
    chat.think(
        f"It serves {sure(base)}; {base * factor} / {base} = {factor}. Multiply all by {sure(factor)}.\n"
        + "\n".join(f"{sure(p)}: {sure(n)} * {factor} = {n * factor}" for p, n in amounts.items())
    )
    return _tell(
        rng,
        chat,
        f"For {base * factor} people:\n" + "\n".join(f"- {sure(p)}: {sure(n * factor)} g" for p, n in amounts.items()),
    )


_WITHOUT_TEXT = (
    calculator,
    weather,
    file_search,
    units,
    calendar,
    inventory,
    money,
    reminder,
    trains,
    database,
    todo,
    logs,
    home,
    parcel,
    contacts,
    recipe,
)


def make(rng: Random, chat: Chat, texts) -> Chat:
    """One conversation about one set of functions."""
    chat.maybe_closing(0.15)
    draw = rng.random()
    if draw < 0.03:
        return no_tool(rng, chat)
    if draw < 0.10:
        return dictionary(rng, chat, texts)
    return rng.choice(_WITHOUT_TEXT)(rng, chat)
