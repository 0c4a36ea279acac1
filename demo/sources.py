"""The finite texts behind the packs: WordNet entries and the docstrings of Python's standard library."""

import hashlib
import importlib
import inspect
import re
from dataclasses import dataclass, field
from pathlib import Path

# Lexicographer files whose words are things, plants, animals, food, change, contact, motion, weather, properties;
# people, body and groups are left out.
_LEXFILES = {"noun": {"05", "06", "13", "17", "19", "20", "22", "23", "25", "27", "28"},
             "verb": {"30", "35", "36", "38", "43"}, "adj": {"00"}}  # fmt: skip
_UNWANTED = re.compile(
    r"sex|slang|offensive|disparag|vulgar|obscen|ethnic|genital|breast|drug|weapon|kill|slave|race|nazi|prostitut|"
    r"suicid|religio|buttock|excre|urin|feces|semen|erotic|pejorative|condom|rape|black person|white person",
    re.IGNORECASE,
)
_MODULES = (
    "argparse array ast asyncio base64 bisect calendar cmath codecs collections colorsys configparser contextlib copy "
    "csv datetime decimal difflib dis email enum filecmp fileinput fnmatch fractions ftplib functools gettext glob "
    "graphlib gzip hashlib heapq hmac html imaplib inspect io ipaddress itertools json keyword linecache locale "
    "logging lzma mailbox math mimetypes operator os os.path pathlib pickle pickletools platform plistlib pprint queue "
    "quopri random re reprlib sched secrets select shelve shlex shutil signal smtplib socket sqlite3 ssl stat "
    "statistics string stringprep struct subprocess sys sysconfig tarfile tempfile textwrap threading time timeit "
    "token tokenize trace traceback tracemalloc types typing unicodedata unittest urllib.parse urllib.request uuid "
    "warnings wave weakref xml.dom xml.etree.ElementTree zipfile zlib"
).split()
_BUILTIN_TYPES = (str, bytes, list, dict, set, tuple, int, float, complex, frozenset, bytearray, memoryview, slice)


@dataclass(frozen=True)
class Entry:
    """A word with its most frequent sense."""

    word: str
    part: str
    gloss: str
    examples: tuple[str, ...]
    synonyms: tuple[str, ...]
    kind_of: str  # a word for the more general thing, or ""
    kinds: tuple[str, ...] = field(default=())  # words for more special things


@dataclass(frozen=True)
class Function:
    """A documented function of the standard library."""

    name: str
    module: str
    signature: str
    doc: str


def seen_in_training(name: str) -> bool:
    """Half of all entries, chosen by hash: the other half occurs in committed rows only."""
    return hashlib.sha256(f"entry {name}".encode()).digest()[0] < 128


def load_wordnet(folder: Path) -> list[Entry]:
    """Words that WordNet's own frequency counts call used, one entry a word and part of speech, in file order."""
    return [entry for part in _LEXFILES for entry in _entries(folder, part)]


def _entries(folder: Path, part: str):
    synsets = {}
    for line in _lines(folder / f"data.{part}"):
        head, _, gloss = line.partition(" | ")
        fields = head.split()
        count = int(fields[3], 16)
        words = [re.sub(r"\(\w+\)$", "", w).replace("_", " ") for w in fields[4 : 4 + 2 * count : 2]]
        pointers = fields[5 + 2 * count :]
        links = [(pointers[i], pointers[i + 1]) for i in range(0, 4 * int(fields[4 + 2 * count]), 4)]
        synsets[fields[0]] = fields[1], words, links, gloss.strip()
    for line in _lines(folder / f"index.{part}"):
        fields = line.split()
        word, senses = fields[0], int(fields[2])
        if int(fields[-senses - 1]) and re.fullmatch(r"[a-z]{3,11}", word):
            entry = _entry(word, part, synsets, fields[-senses])
            if entry:
                yield entry


def _entry(word: str, part: str, synsets: dict, offset: str) -> Entry | None:
    lexfile, words, links, gloss = synsets[offset]
    definition = re.split(r'; *"', gloss)[0].strip().strip(";")
    examples = tuple(e for e in re.findall(r'"([^"]+)"(?!\s*-)', gloss) if e.isascii() and 12 < len(e) < 90)
    odd = not definition.isascii() or '"' in definition or not 12 < len(definition) < 160
    if lexfile not in _LEXFILES[part] or odd or word not in words or _UNWANTED.search(word + " " + gloss):
        return None

    def near(symbol: str) -> list[str]:
        firsts = [synsets[target][1][0] for kind, target in links if kind == symbol and target in synsets]
        return [w for w in dict.fromkeys(firsts) if re.fullmatch(r"[a-z][a-z ]{2,18}", w) and not _UNWANTED.search(w)]

    synonyms = tuple(w for w in words if w != word and re.fullmatch(r"[a-z][a-z ]+", w) and not _UNWANTED.search(w))
    return Entry(word, part, definition, examples, synonyms, next(iter(near("@")), ""), tuple(near("~")[:8]))


def _lines(path: Path):
    return (line for line in path.read_text(encoding="ascii").splitlines() if not line.startswith("  "))


def load_docstrings() -> list[Function]:
    """First paragraphs of docstrings, sorted by name; what they say depends on the running Python's version."""
    found = {}
    for module_name in _MODULES:
        module = importlib.import_module(module_name)
        for name in getattr(module, "__all__", None) or [n for n in dir(module) if not n.startswith("_")]:
            thing = getattr(module, name, None)
            if callable(thing):
                _add(found, f"{module_name}.{name}", module_name, thing)
            if inspect.isclass(thing):
                for method, value in vars(thing).items():
                    if callable(value) and not method.startswith("_"):
                        _add(found, f"{module_name}.{name}.{method}", module_name, value)
    for kind in _BUILTIN_TYPES:
        for method, value in sorted(vars(kind).items()):
            if callable(value) and not method.startswith("_"):
                _add(found, f"{kind.__name__}.{method}", "builtins", value)
    return [found[name] for name in sorted(found)]


def _add(found: dict, name: str, module: str, thing) -> None:
    doc = getattr(thing, "__doc__", None)
    doc = inspect.cleandoc(doc).split("\n\n")[0] if isinstance(doc, str) else ""
    doc = " ".join(doc.split())
    try:
        signature = str(inspect.signature(thing))
    except (TypeError, ValueError):
        signature = ""
    known = any(f.doc == doc for f in found.values()) if len(doc) < 60 else False
    simple = len(signature) < 70 and " at 0x" not in signature and "<" not in signature
    if 25 < len(doc) < 300 and doc.isascii() and "->" not in doc[:60] and "<|" not in doc and simple and not known:
        found[name] = Function(name, module, signature, doc)
