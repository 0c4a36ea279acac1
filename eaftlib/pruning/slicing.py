"""Structural pruning: a checkpoint without the removed experts, cut in the stored format and written as a stream."""

import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..errors import CheckpointError
from ..files import read_json, sha256, write_json
from ..model import fingerprint
from ..model.checkpoint import INDEX_FILE, Checkpoint
from ..model.writer import New, Progress, Stored, TensorSource, write_shards
from ..progress import progress_bar
from .keepsets import KeepSet

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
        manifest = _write(checkpoint, keep, new, temporary, sizes, progress)
        if (trained := recovered or read_manifest(checkpoint).get("recovered")) is not None:
            manifest["recovered"] = dict(trained)
        write_json(temporary / MANIFEST, manifest)
        temporary.chmod(0o755)
        temporary.rename(out_dir)
        for file, digest in manifest["sha256"].items():
            fingerprint.remember(out_dir / file, digest)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)
    return manifest


def read_manifest(checkpoint: Checkpoint) -> dict:
    """What pruning left in a checkpoint: how its experts were chosen and, if it was trained since, how; else empty."""
    manifest = checkpoint.folder / MANIFEST
    return read_json(manifest, CheckpointError, "prune again") if manifest.is_file() else {}


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
    settings = json.loads((checkpoint.folder / "config.json").read_text())
    write_json(folder / "config.json", settings | {checkpoint.family.experts_key: keep.keep_n})
    mapping = {str(layer): {str(new): int(old) for new, old in enumerate(ids)} for layer, ids in enumerate(keep.ids)}
    write_json(folder / MAPPING, mapping)
    return [*written, "config.json", MAPPING]


def keep_all(checkpoint: Checkpoint) -> KeepSet:
    """The keep-set that removes nothing."""
    ids = np.tile(np.arange(checkpoint.num_experts), (checkpoint.num_layers, 1))
    return KeepSet(ids, checkpoint.num_experts, {"criterion": None, "keep_n": checkpoint.num_experts})
