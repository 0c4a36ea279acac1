"""What a pass has finished, on disk: one that is killed goes on from there, and ends with the same bytes.

A part is a run of blocks and what each observer has noted of them. Parts are written at most SECONDS apart, each next to the
last; one takes in those before it that are no longer than itself, so that a pass of any length leaves a few files, together as
large as what it has noted.
"""

import hashlib
import json
import re
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..files import write_atomically
from .observers import Observer

FOLDER = "journal"  # in a run's out_dir
SECONDS = 60.0  # between parts: beside the wave that it falls into, what a kill costs
_NAME = re.compile(r"(\d+)-(\d+)\.safetensors")


class Part(NamedTuple):
    """Blocks ``first`` to ``end``, without it."""

    first: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.first


class Journal:
    """Of one pass, in a folder of its own beneath ``folder``."""

    def __init__(self, folder: Path, identity: Mapping[str, object]):
        """identity: all that the pass's numbers depend on, as JSON has it; parts of another are never seen."""
        self.identity = json.dumps(identity, sort_keys=True)
        self.folder = Path(folder) / hashlib.sha256(self.identity.encode()).hexdigest()[:16]
        self._parts: list[Part] = []  # of this rank, on disk
        self._pending: Part | None = None
        self._written = time.monotonic()

    def restore(self, mine: Part, observers: Sequence[Observer]) -> list[Part]:
        """Give observers what was noted of ``mine`` blocks; returns the parts.

        Those that reach beyond are another division's, and left alone. A damaged one is removed, with a warning.
        """
        for part in sorted(self._stored(), key=lambda p: (p.first, -p.size)):
            inside_another = self._parts and part.end <= self._parts[-1].end
            if part.first < mine.first or part.end > mine.end or inside_another:
                continue
            if self._load(part, observers):
                self._parts.append(part)
        self._written = time.monotonic()
        return list(self._parts)

    def add(self, done: Part, observers: Sequence[Observer]) -> None:
        """A run of blocks is done; it is written when it is time to."""
        pending = self._pending
        if pending and pending.end != done.first:
            self.flush(observers)
            pending = None
        self._pending = Part(pending.first, done.end) if pending else done
        if time.monotonic() - self._written >= SECONDS:
            self.flush(observers)

    def flush(self, observers: Sequence[Observer]) -> None:
        """Write what is done and not yet on disk."""
        if self._pending is None:
            return
        part, absorbed = self._pending, []
        while self._parts and self._parts[-1].end == part.first and self._parts[-1].size <= part.size:
            absorbed.append(self._parts.pop())
            part = Part(absorbed[-1].first, part.end)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what observers have only started to copy
        tensors = {name: view.contiguous() for name, view in _noted(part, observers).items()}
        metadata = {"identity": self.identity, "sha256": _digest(tensors)}
        write_atomically(self._path(part), lambda temporary: save_file(tensors, temporary, metadata))
        for old in absorbed:
            self._path(old).unlink(missing_ok=True)
        self._parts.append(part)
        self._pending, self._written = None, time.monotonic()

    def remove(self) -> None:
        """The pass's result is kept elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)  # several ranks may be at it
        if self.folder.parent.is_dir() and not any(self.folder.parent.iterdir()):
            shutil.rmtree(self.folder.parent, ignore_errors=True)

    def _stored(self) -> list[Part]:
        found = map(_NAME.fullmatch, (path.name for path in self.folder.glob("*.safetensors")))
        return [Part(int(match[1]), int(match[2])) for match in found if match]

    def _path(self, part: Part) -> Path:
        return self.folder / f"{part.first}-{part.end}.safetensors"

    def _load(self, part: Part, observers: Sequence[Observer]) -> bool:
        path, views = self._path(part), _noted(part, observers)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                metadata = file.metadata() or {}
        except SafetensorError as cause:
            return self._discard(path, str(cause))
        shapes = {name: (t.shape, t.dtype) for name, t in tensors.items()}
        if metadata.get("identity") != self.identity or shapes != {
            name: (v.shape, v.dtype) for name, v in views.items()
        }:
            return self._discard(path, "it is of another pass")
        if metadata.get("sha256") != _digest(tensors):
            return self._discard(path, "its bytes are not those that were written")
        for name, view in views.items():
            view.copy_(tensors[name])
        return True

    def _discard(self, path: Path, why: str) -> bool:
        warnings.warn(f"{path} cannot be gone on from, and is removed: {why}", stacklevel=2)
        path.unlink(missing_ok=True)
        return False


def _noted(part: Part, observers: Sequence[Observer]) -> dict[str, torch.Tensor]:
    return {f"{i}.{name}": t for i, o in enumerate(observers) for name, t in o.noted(part.first, part.end).items()}


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + b"\0")
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
