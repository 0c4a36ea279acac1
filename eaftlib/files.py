"""Files that are either whole or absent, and JSON that explains itself when it cannot be read."""

import hashlib
import json
import os
import reprlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from .errors import EaftError

Shape = TypeVar("Shape")  # a pydantic model


def read_json(path: Path, error: type[EaftError], advice: str) -> dict:
    """The object in a JSON file; raises ``error`` with ``advice`` when it is missing, cut short or no object."""
    content = parse_json(path, error, advice)
    if not isinstance(content, dict):
        raise error(f"{path} holds a JSON {type(content).__name__}, expected an object; {advice}")
    return content


def parse_json(path: Path, error: type[EaftError], advice: str) -> object:
    """Whatever a JSON file holds. NaN, a name given twice, and text that UTF-8 cannot hold are errors too."""
    require_file(path, error, advice)
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_each_name_once)
        if "\\u" in text:  # the only way to a lone half of a surrogate pair
            json.dumps(content, ensure_ascii=False).encode()
        return content
    except OSError as cause:
        raise error(f"{path} cannot be read ({cause}); {advice}") from cause
    except RecursionError:
        raise error(f"{path} is nested too deeply to be read; {advice}") from None
    except ValueError as cause:  # no JSON, no UTF-8, an integer of more digits than Python converts
        raise error(f"{path} is not JSON ({cause}): it was cut short or is another kind of file; {advice}") from cause


def read_typed(path: Path, shape: type[Shape], error: type[EaftError], advice: str) -> Shape:
    """A JSON file as a pydantic model; the first field that is wrong is named with what was found and expected."""
    content = read_json(path, error, advice)
    return typed(content, shape, f"{path}", error, advice)


def typed(content: object, shape: type[Shape], where: str, error: type[EaftError], advice: str) -> Shape:
    """``content`` as a pydantic model; ``where`` it is from begins the message of the error."""
    from pydantic import ValidationError

    try:
        return shape.model_validate(content)
    except ValidationError as cause:
        first, *others = cause.errors(include_url=False)
        field = ".".join(map(str, first["loc"])) or "the file"
        found = "" if first["type"] in ("missing", "value_error") else f", found {reprlib.repr(first['input'])}"
        more = f" ({len(others)} more problems)" if others else ""
        what = first["msg"].removeprefix("Value error, ")
        raise error(f"{where}: {field}: {what}{found}{more}; {advice}") from None


def require_file(path: Path, error: type[EaftError], advice: str) -> None:
    """A regular file: a folder cannot be read, and reading a FIFO or a device may never end."""
    if not os.path.exists(path):
        raise error(f"{path} does not exist; {advice}")
    if not os.path.isfile(path):
        raise error(f"{path} is no file, but a folder or a device; {advice}")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"found {name}, which is no number of JSON")


def _each_name_once(pairs: list[tuple[str, object]]) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise ValueError(f"{reprlib.repr(twice)} is given twice in one object")
    return content


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: dict) -> None:
    """Atomic; non-finite numbers are refused, since JSON has none."""
    write_atomically(path, lambda temporary: Path(temporary).write_text(json_text(content)))


def json_text(content: dict) -> str:
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def write_atomically(path: Path, write: Callable[[str], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it: readers see the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def write_together(folder: Path, contents: dict[str, bytes]) -> list[Path]:
    """Every file is whole under a temporary name before the first gets its own: a disk that is full leaves the old ones.

    contents: by path inside ``folder``. Returns the files' paths.
    """
    temporary: dict[Path, Path] = {}
    try:
        for name, content in contents.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            temporary[path] = Path(partial)
            with open(handle, "wb") as file:
                file.write(content)
            temporary[path].chmod(0o644)
        for path, partial in temporary.items():
            partial.replace(path)
    finally:
        for partial in temporary.values():
            partial.unlink(missing_ok=True)
    return list(temporary)
