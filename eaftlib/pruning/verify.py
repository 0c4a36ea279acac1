"""A checkpoint, wholly: headers and configuration, tokenizer, every value, every hash that there is to compare with."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from ..errors import CheckpointError
from ..files import read_typed, sha256
from ..model import fingerprint, values
from ..model.checkpoint import INDEX_FILE, Checkpoint
from ..model.settings import CONFIG_FILE
from ..progress import progress_bar
from . import manifest
from .slicing import MANIFEST, MAPPING, checkpoint_sizes

SHOWN = 20  # problems in a message


def verify(model: str, progress: bool = True) -> str:
    """What was found right, in a sentence. Raises CheckpointError that names whatever is wrong.

    Each byte is read once, whatever is known of its file's hash; memory is bounded by a few pieces of 8 MiB.
    """
    checkpoint = Checkpoint(model)
    vocabulary = len(checkpoint.tokenizer)
    total = sum(tensor.nbytes for tensors in checkpoint.shards.values() for tensor in tensors.values())
    with progress_bar(total, "verify", "B", progress) as advance:
        hashes, problems = values.scan(checkpoint.shards, advance)
    problems += _against_hub(checkpoint.folder, hashes)
    is_pruned = (checkpoint.folder / MANIFEST).exists()
    if is_pruned:
        problems += _against_manifest(checkpoint, hashes)
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if problems[SHOWN:] else []
        raise CheckpointError("\n  ".join([f"{checkpoint.folder} is damaged:", *problems[:SHOWN], *more]))
    compared = f"every file as {MANIFEST} says" if is_pruned else f"no {MANIFEST} to compare with"
    return (
        f"{checkpoint.folder} is whole: {len(checkpoint.names)} tensors in {len(hashes)} files, "
        f"{checkpoint_sizes(checkpoint).total:,} bytes, all values finite; {checkpoint.num_layers} layers of "
        f"{checkpoint.num_experts} experts, top {checkpoint.top_k}; {vocabulary:,} tokens; {compared}"
    )


def _against_hub(folder: Path, hashes: Mapping[str, str]) -> Iterator[str]:
    """Files of the hub's cache are named by their hash."""
    for file, found in hashes.items():
        expected = fingerprint.named_by_hub(folder / file)
        if expected not in (None, found):
            yield f"{file} has SHA-256 {found}, the hub gave {expected}: fetch the checkpoint again"


def _against_manifest(checkpoint: Checkpoint, hashes: Mapping[str, str]) -> Iterator[str]:
    written = read_typed(checkpoint.folder / MANIFEST, manifest.Manifest, CheckpointError, "prune again")
    for file, expected in written.sha256.items():
        path = checkpoint.folder / file
        if not path.is_file():
            yield f"{file} is missing, {MANIFEST} lists it"
        elif (found := hashes.get(file) or sha256(path)) != expected:
            yield f"{file} has SHA-256 {found}, {MANIFEST} says {expected}: it is not the file that was written"
    for file in sorted({*hashes, INDEX_FILE, CONFIG_FILE, MAPPING} - written.sha256.keys()):
        yield f"{file} is not listed in {MANIFEST}"
    if checkpoint.num_experts != written.num_experts_after:
        yield f"{CONFIG_FILE} speaks of {checkpoint.num_experts} experts, {MANIFEST} of {written.num_experts_after}"
    if checkpoint_sizes(checkpoint).total != written.bytes_after:
        yield f"the tensors have {checkpoint_sizes(checkpoint).total:,} bytes, {MANIFEST} says {written.bytes_after:,}"
    mapping = read_typed(checkpoint.folder / MAPPING, manifest.Mapping, CheckpointError, "prune again")
    if (problem := mapping.problem(checkpoint.num_layers, written)) is not None:
        yield f"{MAPPING}: {problem}"
