"""Writing a checkpoint as a stream of tensors: bytes as they lie in another one, bytes of some experts, or new values."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import torch

from ..files import write_json
from .checkpoint import INDEX_FILE
from .shards import DTYPES, PIECE_BYTES, StoredTensor

SHARD_BYTES = 4 << 30  # as large as the published checkpoint's
_SAFETENSORS_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorSource(Protocol):
    """A tensor to be written: its dtype as the safetensors format spells it; its bytes, row-major, PIECE_BYTES at a time."""

    dtype: str
    shape: list[int]
    nbytes: int

    def pieces(self) -> Iterator[memoryview]: ...


class Stored:
    """A tensor of another checkpoint, or of those only the rows of dim 0 that are given."""

    def __init__(self, tensor: StoredTensor, rows: list[int] | None = None):
        self._tensor, self.dtype = tensor, tensor.dtype
        self.shape = tensor.shape if rows is None else [len(rows), *tensor.shape[1:]]
        size = tensor.nbytes if rows is None else tensor.nbytes // tensor.shape[0]
        self._runs = [(row * size, size) for row in ([0] if rows is None else rows)]
        self.nbytes = size * len(self._runs)

    def pieces(self) -> Iterator[memoryview]:
        return self._tensor.pieces(self._runs)


class New:
    """A tensor in memory."""

    def __init__(self, tensor: torch.Tensor):
        self._values = tensor.detach().cpu().contiguous()
        self.dtype, self.shape, self.nbytes = _SAFETENSORS_NAMES[tensor.dtype], list(tensor.shape), tensor.nbytes

    def pieces(self) -> Iterator[memoryview]:
        values = memoryview(self._values.view(-1).view(torch.uint8).numpy())
        return (values[start : start + PIECE_BYTES] for start in range(0, self.nbytes, PIECE_BYTES))


@dataclass(frozen=True)
class Progress:
    """Called with the bytes of each piece, and with the name of each file that is whole."""

    written: Callable[[int], object]
    finished: Callable[[str], object]


def write_shards(folder: Path, tensors: Mapping[str, TensorSource], progress: Progress) -> None:
    """Shards of at most SHARD_BYTES (a larger tensor has one of its own) and their index, tensors in the order given."""
    from huggingface_hub import split_state_dict_into_shards_factory

    plan = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    shards = list(plan.filename_to_tensors.values())
    file_of = {}
    for i, names in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"  # numbered even if there is one: it has an index too
        _write_shard(folder / file, {name: tensors[name] for name in names}, progress.written)
        file_of |= dict.fromkeys(names, file)
        progress.finished(file)
    index = {"metadata": {"total_size": plan.metadata["total_size"]}}
    write_json(folder / INDEX_FILE, index | {"weight_map": {name: file_of[name] for name in tensors}})
    progress.finished(INDEX_FILE)


def _write_shard(path: Path, tensors: Mapping[str, TensorSource], written: Callable[[int], object]) -> None:
    """A safetensors file, written piece by piece: no tensor that is copied is ever in memory as a whole."""
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins aligned
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            _write_pieces(tensor, out, written)


def _write_pieces(tensor: TensorSource, out: BinaryIO, written: Callable[[int], object]) -> None:
    for piece in tensor.pieces():
        out.write(piece)
        written(len(piece))
