"""Files that are either whole or absent, and JSON that explains itself when it cannot be read."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from .errors import EaftError


def read_json(path: Path, error: type[EaftError], advice: str) -> dict:
    """The object in a JSON file; raises ``error`` with ``advice`` when it is missing, cut short or no object."""
    content = parse_json(path, error, advice)
    if not isinstance(content, dict):
        raise error(f"{path} holds a JSON {type(content).__name__}, expected an object; {advice}")
    return content


def parse_json(path: Path, error: type[EaftError], advice: str) -> object:
    """Whatever a JSON file holds."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise error(f"{path} does not exist; {advice}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as cause:
        raise error(f"{path} is not JSON ({cause}): it was cut short or is another kind of file; {advice}") from cause


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
