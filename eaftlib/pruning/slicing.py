"""Structural pruning: a checkpoint without the removed experts, cut in the stored format and written as a stream."""

import json
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import CheckpointError
from ..files import sha256, write_json
from ..model import fingerprint
from ..model.checkpoint import INDEX_FILE, Checkpoint, is_expert_tensor
from .keepsets import KeepSet

SHARD_BYTES = 4 << 30  # as large as the published checkpoint's
COPY_BYTES = 8 << 20  # all that is held in memory
MANIFEST = "prune_manifest.json"
MAPPING = "expert_mapping.json"
MANIFEST_SCHEMA = "eaft-prune/1"
_NOT_COPIED = {"config.json", INDEX_FILE, "README.md", MANIFEST, MAPPING}  # a card describes the model it came with


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
        size = _sliced_bytes(checkpoint, name, kept)
        total += size
        experts += size if is_expert_tensor(name) else 0
    return Sizes(total, experts)


def _sliced_bytes(checkpoint: Checkpoint, name: str, keep_n: int) -> int:
    size = checkpoint.location(name).nbytes
    return size // checkpoint.num_experts * keep_n if is_expert_tensor(name) else size


def prune(checkpoint: Checkpoint, keep: KeepSet, out_dir: str | Path, progress: bool = True) -> dict:
    """Write the checkpoint with only the kept experts to ``out_dir`` and return its manifest.

    Everything goes to a temporary folder beside it that is renamed at the end. Raises CheckpointError when out_dir
    exists or the disk lacks the space; nothing is left behind then.
    """
    out_dir = Path(out_dir)
    if out_dir.exists():
        raise CheckpointError(
            f"{out_dir} exists already; pruning never overwrites. Choose another out_dir or remove it."
        )
    sizes = checkpoint_sizes(checkpoint, keep.keep_n)
    free = shutil.disk_usage(next(p for p in out_dir.absolute().parents if p.exists())).free
    if free < sizes.total * 1.02:
        raise CheckpointError(
            f"{out_dir.parent} has {free / 1e9:.2f} GB free; the pruned checkpoint takes {sizes.total / 1e9:.2f} GB. "
            "Free some space or choose another out_dir."
        )
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    try:
        manifest = _write(checkpoint, keep, temporary, sizes, progress)
        temporary.chmod(0o755)
        temporary.rename(out_dir)
        for file, digest in manifest["sha256"].items():
            fingerprint.remember(out_dir / file, digest)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)
    return manifest


def _write(checkpoint: Checkpoint, keep: KeepSet, folder: Path, sizes: Sizes, progress: bool) -> dict:
    with ThreadPoolExecutor(1) as hasher:  # a shard is hashed, from the page cache, while the next one is cut
        hashes: dict = {}

        def finished(file: str) -> None:
            hashes[file] = hasher.submit(sha256, folder / file)

        _write_shards(checkpoint, keep, folder, sizes, finished, progress)
        for file in _write_other_files(checkpoint, keep, folder):
            finished(file)
        files = {file: future.result() for file, future in sorted(hashes.items())}
    manifest = {
        "schema": MANIFEST_SCHEMA,
        "source": {"model_id": checkpoint.model_id, "model_sha256": checkpoint.sha256},
        "num_experts_before": checkpoint.num_experts,
        "num_experts_after": keep.keep_n,
        "chosen_by": keep.chosen_by,
        "bytes_before": checkpoint_sizes(checkpoint).total,
        "bytes_after": sizes.total,
        "sha256": files,
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def _write_shards(
    checkpoint: Checkpoint, keep: KeepSet, folder: Path, sizes: Sizes, finished: Callable[[str], None], progress: bool
) -> None:
    from tqdm import tqdm

    shards = _plan_shards(checkpoint, keep)
    weight_map = {}
    with tqdm(total=sizes.total, unit="B", unit_scale=True, desc="prune", disable=not progress) as bar:
        for i, names in enumerate(shards, start=1):
            file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            _write_shard(checkpoint, keep, names, folder / file, bar.update)
            weight_map |= dict.fromkeys(names, file)
            finished(file)
    index = {"metadata": {"total_size": sizes.total}, "weight_map": weight_map}
    write_json(folder / INDEX_FILE, index)
    finished(INDEX_FILE)


def _write_shard(
    checkpoint: Checkpoint, keep: KeepSet, names: list[str], path: Path, copied: Callable[[int], object]
) -> None:
    """A safetensors file whose bytes come straight from the source's: no tensor is ever in memory as a whole."""
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        stored, start = checkpoint.location(name), end
        end += _sliced_bytes(checkpoint, name, keep.keep_n)
        shape = [keep.keep_n, *stored.shape[1:]] if is_expert_tensor(name) else stored.shape
        header[name] = {"dtype": stored.dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins aligned
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            _copy_kept(checkpoint, keep, name, out, copied)


def _copy_kept(
    checkpoint: Checkpoint, keep: KeepSet, name: str, out: BinaryIO, copied: Callable[[int], object]
) -> None:
    stored = checkpoint.location(name)
    runs = [(stored.offset, stored.nbytes)]
    if is_expert_tensor(name):
        row = stored.nbytes // checkpoint.num_experts
        runs = [(stored.offset + int(expert) * row, row) for expert in keep.ids[int(name.split(".")[2])]]
    buffer = memoryview(bytearray(min(COPY_BYTES, max(size for _, size in runs))))
    with stored.file.open("rb", buffering=0) as source:
        for offset, remaining in runs:
            source.seek(offset)
            while remaining:
                count = source.readinto(buffer[: min(remaining, COPY_BYTES)])
                if not count:
                    raise CheckpointError(f"{stored.file} ended inside {name}; fetch the checkpoint again")
                out.write(buffer[:count])
                copied(count)
                remaining -= count


def _plan_shards(checkpoint: Checkpoint, keep: KeepSet) -> list[list[str]]:
    shards: list[list[str]] = []
    filled = SHARD_BYTES
    for name in checkpoint.names:
        size = _sliced_bytes(checkpoint, name, keep.keep_n)
        if filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_other_files(checkpoint: Checkpoint, keep: KeepSet, folder: Path) -> list[str]:
    written = []
    for source in sorted(checkpoint.folder.iterdir()):
        if source.is_file() and source.suffix != ".safetensors" and source.name not in _NOT_COPIED:
            shutil.copyfile(source, folder / source.name)
            written.append(source.name)
    settings = json.loads((checkpoint.folder / "config.json").read_text())
    write_json(folder / "config.json", settings | {"num_local_experts": keep.keep_n})
    mapping = {str(layer): {str(new): int(old) for new, old in enumerate(ids)} for layer, ids in enumerate(keep.ids)}
    write_json(folder / MAPPING, mapping)
    return [*written, "config.json", MAPPING]


def keep_all(checkpoint: Checkpoint) -> KeepSet:
    """The keep-set that removes nothing."""
    ids = np.tile(np.arange(checkpoint.num_experts), (checkpoint.num_layers, 1))
    return KeepSet(ids, checkpoint.num_experts, {"criterion": None, "keep_n": checkpoint.num_experts})
