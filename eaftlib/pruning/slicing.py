"""Structural pruning: a checkpoint without the removed experts, cut in the stored format and written as a stream."""

import fcntl
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import torch

from ..errors import CheckpointError
from ..files import read_json, sha256, typed, write_json
from ..model import fingerprint
from ..model.checkpoint import INDEX_FILE, Checkpoint
from ..model.settings import CONFIG_FILE
from ..model.shards import PIECE_BYTES
from ..model.writer import New, Progress, Stored, TensorSource, write_shards
from ..progress import progress_bar
from .keepsets import KeepSet

MANIFEST = "prune_manifest.json"
MAPPING = "expert_mapping.json"
MANIFEST_SCHEMA = "eaft-prune/1"
_NOT_COPIED = {CONFIG_FILE, INDEX_FILE, "README.md", MANIFEST, MAPPING}  # a card describes the model it came with


@dataclass(frozen=True)
class Sizes:
    """Bytes of all tensors, and of the experts' among them."""

    total: int
    experts: int


def checkpoint_sizes(checkpoint: Checkpoint, keep_n: int | None = None) -> Sizes:
    """Bytes of the checkpoint, or of what would be left with ``keep_n`` experts a layer."""
    kept = checkpoint.num_experts if keep_n is None else keep_n
    total = experts = 0
    for name in checkpoint.names:
        size = checkpoint.location(name).nbytes
        if checkpoint.family.layer_of_experts(name) is not None:
            size = size // checkpoint.num_experts * kept
            experts += size
        total += size
    return Sizes(total, experts)


def num_parameters(checkpoint: Checkpoint, keep_n: int) -> int:
    """Numbers in the checkpoint's tensors, with ``keep_n`` experts a layer; of MXFP4, those that the bytes encode."""
    total = 0
    for name in checkpoint.names:
        if not name.endswith("_scales"):
            numbers = math.prod(checkpoint.shape(name)) * (2 if name.endswith("_blocks") else 1)
            of_experts = checkpoint.family.layer_of_experts(name) is not None
            total += numbers // checkpoint.num_experts * keep_n if of_experts else numbers
    return total


def prune(
    checkpoint: Checkpoint,
    keep: KeepSet,
    out_dir: str | Path,
    *,
    new: Mapping[str, torch.Tensor] = {},
    recovered: Mapping | None = None,
    progress: bool = True,
) -> dict:
    """Write the checkpoint with only the kept experts to ``out_dir`` and return its manifest.

    new: values of some of its tensors, of the whole shape, in place of the stored ones; the manifest says in
    ``recovered`` where they are from, and repeats it where a recovered checkpoint is pruned further.

    Everything goes to a folder beside it, ``_partial``, that is renamed at the end, after the result was opened and compared
    with what it was made from. Raises CheckpointError when out_dir exists, another process is writing it, or the disk lacks
    the space; nothing is left behind then. What a killed process left is removed.
    """
    out_dir = Path(out_dir)
    sizes = checkpoint_sizes(checkpoint, keep.keep_n)
    _require_new(out_dir)
    with _alone(out_dir) as folder:
        _require_space(out_dir, sizes.total)
        manifest = _write(checkpoint, keep, new, folder, sizes, progress)
        if (trained := recovered or read_manifest(checkpoint).get("recovered")) is not None:
            manifest["recovered"] = dict(trained)
        write_json(folder / MANIFEST, manifest)
        _require_equal(Checkpoint(str(folder)), sliced_tensors(checkpoint, keep, new))
        _require_new(out_dir)
        folder.rename(out_dir)
    for file, digest in manifest["sha256"].items():
        fingerprint.remember(out_dir / file, digest)
    return manifest


def _require_new(out_dir: Path) -> None:
    if os.path.lexists(out_dir):
        raise CheckpointError(
            f"{out_dir} exists already; pruning never overwrites. Choose another out_dir or remove it."
        )


def _require_space(out_dir: Path, wanted: int) -> None:
    free = shutil.disk_usage(out_dir.parent).free
    if free < wanted * 1.02:
        raise CheckpointError(
            f"{out_dir.parent} has {free / 1e9:.2f} GB free; the pruned checkpoint takes {wanted / 1e9:.2f} GB. "
            "Free some space or choose another out_dir."
        )


def _partial(out_dir: Path) -> Path:
    """Where a checkpoint lies while it is being written, always the same: so that a later run finds what a killed one left."""
    return out_dir.with_name(f".{out_dir.name}.partial")


@contextmanager
def _alone(out_dir: Path) -> Iterator[Path]:
    """An empty folder for what will be ``out_dir``, which no other process writes to; gone afterwards, unless renamed.

    The lock is on a file beside the checkpoint in ``_partial``: it ends with the process that holds it, however that ends.
    """
    partial = _partial(out_dir)
    made = [folder for folder in (partial, *partial.parents) if not folder.exists()]
    partial.mkdir(parents=True, exist_ok=True)
    with _locked(partial / "lock", out_dir):
        folder = partial / "checkpoint"
        try:
            _require_new(out_dir)
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir()
            yield folder
        finally:
            if folder.exists():
                shutil.rmtree(folder)
            (partial / "lock").unlink()
            for empty in (partial, *made):
                with suppress(OSError):  # it is not: the result is there, or another process begins at this moment
                    empty.rmdir()


def _locked(path: Path, out_dir: Path) -> TextIO:
    """The file, locked. Raises CheckpointError where another process holds it, or has removed it meanwhile."""
    with ExitStack() as stack, suppress(BlockingIOError, FileNotFoundError):
        lock = stack.enter_context(path.open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
            stack.pop_all()
            return lock
    raise CheckpointError(f"{out_dir} is being written by another process. Wait for it, or choose another out_dir.")


def _require_equal(written: Checkpoint, sources: Mapping[str, TensorSource]) -> None:
    """What is on disk is what was to be written: every byte, kept experts' as they lie in the source."""
    buffer = np.empty(PIECE_BYTES, np.uint8)
    for name, source in sources.items():
        tensor = written.location(name)
        with tensor.file.open("rb") as file:
            file.seek(tensor.offset)
            for piece in map(_as_array, source.pieces()):
                count = file.readinto(buffer[: len(piece)])
                if not np.array_equal(buffer[:count], piece):
                    raise CheckpointError(
                        f"{tensor.file}: tensor {name!r} is not what was to be written, before byte {file.tell():,}: the "
                        "source has changed meanwhile, or the disk or the memory of this machine is at fault"
                    )


def _as_array(piece: memoryview) -> np.ndarray:
    return np.frombuffer(piece, np.uint8)


def read_manifest(checkpoint: Checkpoint) -> dict:
    """What pruning left in a checkpoint: how its experts were chosen and, if it was trained since, how; else empty."""
    file = checkpoint.folder / MANIFEST
    if not file.exists():
        return {}
    from .manifest import Manifest

    content = read_json(file, CheckpointError, "prune again")
    typed(content, Manifest, f"{file}", CheckpointError, "prune again")
    return content


def _write(
    checkpoint: Checkpoint,
    keep: KeepSet,
    new: Mapping[str, torch.Tensor],
    folder: Path,
    sizes: Sizes,
    progress: bool,
) -> dict:
    with ThreadPoolExecutor(1) as hasher:  # a shard is hashed, from the page cache, while the next one is cut
        hashes: dict = {}

        def finished(file: str) -> None:
            hashes[file] = hasher.submit(sha256, folder / file)

        with progress_bar(sizes.total, "prune", "B", progress) as advance:
            write_shards(folder, sliced_tensors(checkpoint, keep, new), Progress(advance, finished))
        for file in _write_other_files(checkpoint, keep, folder):
            finished(file)
        files = {file: future.result() for file, future in sorted(hashes.items())}
    return {
        "schema": MANIFEST_SCHEMA,
        "source": {
            "model_id": checkpoint.model_id,
            "revision": checkpoint.revision,
            "model_sha256": checkpoint.sha256,
        },
        "num_experts_before": checkpoint.num_experts,
        "num_experts_after": keep.keep_n,
        "chosen_by": keep.chosen_by,
        "bytes_before": checkpoint_sizes(checkpoint).total,
        "bytes_after": sizes.total,
        "sha256": files,
    }


def sliced_tensors(
    checkpoint: Checkpoint, keep: KeepSet, new: Mapping[str, torch.Tensor] = {}
) -> dict[str, TensorSource]:
    """Every tensor of the pruned checkpoint: bytes of this one, or of the new values."""
    sources: dict[str, TensorSource] = {}
    for name in checkpoint.names:
        layer = checkpoint.family.layer_of_experts(name)
        rows = None if layer is None else keep.ids[layer].tolist()
        if name in new:
            sources[name] = New(new[name] if rows is None else new[name][rows])
        else:
            sources[name] = Stored(checkpoint.location(name), rows)
    return sources


def _write_other_files(checkpoint: Checkpoint, keep: KeepSet, folder: Path) -> list[str]:
    written = []
    for source in sorted(checkpoint.folder.iterdir()):
        if source.is_file() and source.suffix != ".safetensors" and source.name not in _NOT_COPIED:
            shutil.copyfile(source, folder / source.name)
            written.append(source.name)
    settings = read_json(checkpoint.folder / CONFIG_FILE, CheckpointError, "fetch the checkpoint again")
    write_json(folder / CONFIG_FILE, settings | {checkpoint.family.experts_key: keep.keep_n})
    mapping = {str(layer): {str(new): int(old) for new, old in enumerate(ids)} for layer, ids in enumerate(keep.ids)}
    write_json(folder / MAPPING, mapping)
    return [*written, CONFIG_FILE, MAPPING]


def keep_all(checkpoint: Checkpoint) -> KeepSet:
    """The keep-set that removes nothing."""
    ids = np.tile(np.arange(checkpoint.num_experts), (checkpoint.num_layers, 1))
    return KeepSet(ids, checkpoint.num_experts, {"criterion": None, "keep_n": checkpoint.num_experts})
