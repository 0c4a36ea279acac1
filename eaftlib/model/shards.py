"""Safetensors files: a header that is believed only where file and header agree to the byte, and tensors read from it.

The format: 8 bytes, the header's length, little-endian; a JSON object, name -> dtype, shape and ``data_offsets`` from the
header's end on; the tensors' bytes, without gaps (https://huggingface.co/docs/safetensors). Tensors are read, not
memory-mapped: of a mapped file that is cut short the process dies (SIGBUS), of a read one it gets an error.

Measured, from the page cache. Two busy cores of an AMD EPYC, one thread, 64 MiB a tensor: read into new memory 1.9 GB/s, into
memory used before 7.9; copied out of a mapping 1.7. Sixteen cores beside an H200, tensors of gpt-oss's sizes into pinned memory
and on to the GPU: read by one thread 6 GB/s, by eight or more 17; out of a mapping, by PyTorch's threads, 28. So 60 % of what
the memory could give; a disk gives less than either, and layers are read while the GPU computes.
"""

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import CheckpointError
from ..files import parse_json_text, require_file

DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
LONGEST_HEADER_BYTES = 100_000_000  # as in the format's own library
# Of a tensor: what a thread reads at a time, and all that is in memory where it is passed through
PIECE_BYTES = 8 << 20
ADVICE = "fetch the checkpoint again"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a safetensors file: its dtype as the format spells it, and its bytes from ``offset`` on, row-major."""

    file: Path
    name: str
    dtype: str
    shape: list[int]
    offset: int
    nbytes: int

    def read(self, pinned: bool = False) -> torch.Tensor:
        """All of it, on the CPU. Raises CheckpointError when the file has become too short since its header was read."""
        tensor = torch.empty(self.shape, dtype=DTYPES[self.dtype], pin_memory=pinned)
        starts = range(0, self.nbytes, PIECE_BYTES)
        with self.file.open("rb", buffering=0) as file:

            def fill(start: int) -> None:
                values = memoryview(tensor.view(-1).view(torch.uint8).numpy())
                self._fill(file.fileno(), values[start : start + PIECE_BYTES], start)

            if len(starts) <= 1:
                list(map(fill, starts))
            else:
                with ThreadPoolExecutor() as readers:
                    list(readers.map(fill, starts))
        return tensor

    def pieces(self, runs: Sequence[tuple[int, int]] | None = None) -> Iterator[memoryview]:
        """Its bytes, or runs of them (begin, length), a piece at a time; a piece is valid until the next one is asked for."""
        runs = [(0, self.nbytes)] if runs is None else runs
        buffer = memoryview(bytearray(min(PIECE_BYTES, max(length for _, length in runs))))
        with self.file.open("rb", buffering=0) as file:
            for begin, length in runs:
                for start in range(begin, begin + length, PIECE_BYTES):
                    piece = buffer[: begin + length - start]
                    self._fill(file.fileno(), piece, start)
                    yield piece

    def _fill(self, file: int, buffer: memoryview, start: int) -> None:
        """The tensor's bytes from ``start`` on; several threads may read from one file."""
        while len(buffer):
            count = os.preadv(file, [buffer], self.offset + start)
            if not count:
                raise CheckpointError(
                    f"{self.file} ended inside tensor {self.name!r}: it has been cut short since it was opened; {ADVICE}"
                )
            buffer, start = buffer[count:], start + count


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The file's tensors in the order of their bytes. Raises CheckpointError unless they are exactly what the file holds."""
    text, size = _header_text(path)
    entries = parse_json_text(text, f"{path}: its header", CheckpointError, ADVICE)
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: its header is a JSON {type(entries).__name__}, expected an object; {ADVICE}")
    entries.pop("__metadata__", None)
    start = 8 + len(text)
    tensors = [_stored(path, name, entry, start) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            what = "overlaps the tensor before it" if tensor.offset < end else "leaves a gap before it"
            raise _damaged(tensor, f"begins at byte {tensor.offset - start:,}, expected {end - start:,}: it {what}")
        end += tensor.nbytes
    if end != size:
        raise CheckpointError(
            f"{path} is truncated or damaged: it has {size:,} bytes, its header speaks of {end:,}; {ADVICE}"
        )
    return {tensor.name: tensor for tensor in tensors}


def _header_text(path: Path) -> tuple[bytes, int]:
    """The header, and the size of the file."""
    require_file(path, CheckpointError, ADVICE)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LONGEST_HEADER_BYTES):
                raise CheckpointError(
                    f"{path} is truncated or damaged: it has {size:,} bytes, its header would have {length:,}; {ADVICE}"
                )
            return file.read(length), size
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); {ADVICE}") from error


def _stored(path: Path, name: str, entry: object, start: int) -> StoredTensor:
    """One entry of a header as a tensor whose bytes are as many as its shape and dtype say."""
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]} if len(entry) == 3:
            pass
        case _:
            raise CheckpointError(
                f"{path}: its header's entry {name!r} is not a dtype, a shape and two data_offsets; {ADVICE}"
            )
    if not all(type(number) is int and 0 <= number < 2**63 for number in [*shape, begin, end]):
        raise CheckpointError(
            f"{path}: tensor {name!r} has shape {shape} and data_offsets {[begin, end]}, expected integers from 0 to 2^63; "
            f"{ADVICE}"
        )
    tensor = StoredTensor(path, name, dtype, shape, start + begin, end - begin)
    if dtype not in DTYPES:
        raise _damaged(tensor, f"is of type {dtype!r}, expected one of {', '.join(DTYPES)}")
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if tensor.nbytes != expected:
        raise _damaged(tensor, f"has {tensor.nbytes:,} bytes, expected {expected:,} of {dtype} {shape}")
    return tensor


def _damaged(tensor: StoredTensor, what: str) -> CheckpointError:
    return CheckpointError(f"{tensor.file} is truncated or damaged: tensor {tensor.name!r} {what}; {ADVICE}")
