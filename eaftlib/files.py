"""Files that are either whole or absent, and JSON that explains itself when it cannot be read."""

import fcntl
import hashlib
import json
import os
import reprlib
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from .errors import EaftError

Shape = TypeVar("Shape")  # a pydantic model

# A name that a user gives and that files are called by: one that no shell, no Markdown, no spreadsheet and no file system reads
# as more than itself, and short enough for what is put before and after it.
FILE_NAME = "[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}"
HUB_NAME = r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+"  # owner/name of a model or a data set
_PARTIAL = ".partial"  # of temporary files


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
        content = path.read_bytes()
    except OSError as cause:
        raise error(f"{path} cannot be read ({cause}); {advice}") from cause
    return parse_json_text(content, f"{path}", error, advice)


def parse_json_text(content: bytes, where: str, error: type[EaftError], advice: str) -> object:
    """As ``parse_json``, of bytes; ``where`` they are from begins the message of the error."""
    try:
        text = content.decode()
        parsed = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_each_name_once)
        if "\\u" in text:  # the only way to a lone half of a surrogate pair
            json.dumps(parsed, ensure_ascii=False).encode()
        return parsed
    except RecursionError:
        raise error(f"{where} is nested too deeply to be read; {advice}") from None
    except ValueError as cause:  # no JSON, no UTF-8, an integer of more digits than Python converts
        raise error(f"{where} is not JSON ({cause}): it was cut short or is another kind of file; {advice}") from cause


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


def require_writable_folder(folder: str | Path, error: type[EaftError]) -> None:
    """A folder that takes files, or can be made; asked before hours of work, whose result will go there. None is left."""
    path = Path(folder).absolute()
    try:
        with tempfile.TemporaryFile(dir=next(filter(_is_there, (path, *path.parents)))):
            pass
    except (OSError, ValueError) as cause:  # the latter: a name with a null byte
        raise error(f"{str(folder)!r} is no folder that can be written to ({cause}); choose another one") from cause


def _is_there(path: Path) -> bool:
    """Raises OSError, as ``exists`` does not, for a name that is too long or lies below a file."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True


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
    with _temporary(Path(path)) as temporary:
        write(str(temporary))
        temporary.chmod(0o644)
        temporary.replace(path)


def write_together(folder: Path, contents: Mapping[str, bytes | memoryview]) -> list[Path]:
    """Every file is whole under a temporary name before the first gets its own: a disk that is full leaves the old ones.

    contents: by path inside ``folder``, renamed in this order. Returns the files' paths.
    """
    with ExitStack() as stack:
        temporary = {folder / name: stack.enter_context(_temporary(folder / name)) for name in contents}
        for partial, content in zip(temporary.values(), contents.values(), strict=True):
            partial.write_bytes(content)
            partial.chmod(0o644)
        for path, partial in temporary.items():
            partial.replace(path)
    return list(temporary)


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A new file beside ``path``, removed at the end if it is still there; those of killed processes are removed first.

    It is locked as long as this process holds it. The lock goes with the process, however that ends, and so tells what a
    killed one left from what another is writing; ages and process ids do not, across clocks and containers.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    handle, temporary = _locked(path)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)


def _locked(path: Path) -> tuple[int, Path]:
    """(descriptor that holds the lock, path) of a new temporary file for ``path``."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_PARTIAL, dir=path.parent)
        _lock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return handle, Path(name)
        os.close(handle)  # another process took it for a leftover before it was locked


def _remove_leftovers(path: Path) -> None:
    for name in os.listdir(path.parent):
        if not name.startswith(f".{path.name}.") or not name.endswith(_PARTIAL):
            continue
        try:
            handle = os.open(leftover := path.parent / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:  # it was renamed or removed meanwhile, or is another user's
            continue
        if stat.S_ISREG(os.fstat(handle).st_mode) and _lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
            leftover.unlink(missing_ok=True)
        os.close(handle)


def _lock(handle: int, how: int) -> bool:
    """Whether the file is locked now; not where another process holds it, or its file system has no locks."""
    try:
        fcntl.flock(handle, how)
    except OSError:
        return False
    return True
