"""trace.safetensors as it is read: arrays that belong together, ids and rows that there are, and what they came from."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import ResultError
from ..files import require_file, typed

TRACE = "trace.safetensors"
OF_TOKENS = {"nll": ("F32",), "entropy": ("F32",), "predictor_row": ("I64",), "token_row": ("I64",)}
OF_PAIRS = {"expert": ("U8", "I32"), "gate": ("F32",), "norm": ("F32",), "peak": ("F32",)}
OF_SAMPLE = {"grams": ("F32",), "router_logits": ("F32",)}  # both or neither
TYPES = OF_TOKENS | OF_PAIRS | OF_SAMPLE
NUMPY = {"F32": "<f4", "I64": "<i8", "I32": "<i4", "U8": "u1"}
ROUNDING = 1e-3  # by which a computed share may pass 1, and a negative logarithm 0
AGAIN = f"run 01_rank (again), which writes {TRACE} beside ranking.json"


def read_trace(path: Path) -> dict:
    """The fields of a ``Trace``. Raises ResultError where the file is missing, damaged, or contradicts itself."""
    from .provenance import TraceProvenance

    require_file(path, ResultError, AGAIN)
    arrays, metadata = _read(path)
    try:
        num_experts, provenance = int(metadata["num_experts"]), json.loads(metadata["provenance"])
    except (KeyError, ValueError, RecursionError) as cause:
        raise _error(path, "metadata", f"found no num_experts or no provenance that can be read ({cause!r})") from cause
    typed(provenance, TraceProvenance, f"{path}: provenance", ResultError, AGAIN)
    if "sha256" in metadata and metadata["sha256"] != content_sha256(arrays, metadata):  # earlier ones have none
        raise _error(path, "sha256", "what is in the file has another; it was changed after it was written")
    _require_shapes(path, arrays, num_experts, provenance)
    _require_values(path, arrays, num_experts)
    return arrays | {"num_experts": num_experts, "provenance": provenance}


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays and metadata. Read, not mapped: of a file that is cut short meanwhile, mapped memory would end the process."""
    try:
        metadata, header, start = _header(path)
        arrays = {}
        with path.open("rb") as file:
            for name, entry in header.items():
                _require_type(path, name, entry["dtype"])
                file.seek(start + entry["data_offsets"][0])
                found = np.fromfile(file, NUMPY[entry["dtype"]], math.prod(entry["shape"]))
                arrays[name] = found.reshape(entry["shape"])
    except (SafetensorError, OSError, ValueError) as cause:
        raise ResultError(f"{path} is cut short, damaged or no trace ({cause}); {AGAIN}") from cause
    return arrays, metadata


def _header(path: Path) -> tuple[dict[str, str], dict[str, dict], int]:
    """(metadata, entries by name, where data begins). The library compares offsets with shapes and with the file's size."""
    with safe_open(path, framework="np") as file:
        metadata = file.metadata() or {}
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return metadata, header, 8 + length


def _require_type(path: Path, name: str, found: str) -> None:
    if name not in TYPES:
        raise _error(path, name, f"no part of a trace, which has {list(TYPES)}")
    if found not in TYPES[name]:
        raise _error(path, name, f"found {found}, expected {' or '.join(TYPES[name])}")


def _require_shapes(path: Path, arrays: dict[str, np.ndarray], num_experts: int, provenance: dict) -> None:
    wanted = [*OF_TOKENS, *OF_PAIRS, *(OF_SAMPLE if set(OF_SAMPLE) & set(arrays) else ())]
    if missing := [name for name in wanted if name not in arrays]:
        raise _error(path, missing[0], f"missing; found {sorted(arrays)}")
    pairs = arrays["expert"].shape
    if len(pairs) != 3 or 0 in pairs or pairs[2] > num_experts:
        raise _error(path, "expert", f"found {list(pairs)}, expected layers, rows and top_k, at most {num_experts}")
    sample = (pairs[0], provenance.get("recon_tokens_found"))
    expected = dict.fromkeys(OF_TOKENS, (provenance["kept_tokens"],)) | dict.fromkeys(OF_PAIRS, pairs)
    expected |= {"grams": (*sample, num_experts * (num_experts + 1) // 2), "router_logits": (*sample, num_experts)}
    for name, array in arrays.items():
        if array.shape != expected[name]:
            raise _error(path, name, f"found shape {list(array.shape)}, expected {list(expected[name])}")


def _require_values(path: Path, arrays: dict[str, np.ndarray], num_experts: int) -> None:
    """NaN lies outside every limit. What grams may hold, recon says."""
    row = arrays["expert"].shape[1] - 1
    limits = {"nll": (-ROUNDING, np.finfo(np.float32).max), "entropy": (0, 1), "gate": (0, 1 + ROUNDING)}
    limits |= {"norm": (0, np.inf), "peak": (0, np.inf), "predictor_row": (0, row), "token_row": (0, row)}
    for name, (low, high) in (limits | {"expert": (0, num_experts - 1)}).items():
        found = arrays[name].min(), arrays[name].max()
        if not (low <= found[0] and found[1] <= high):
            raise _error(path, name, f"found values from {found[0]} to {found[1]}, expected {low} to {high}")


def content_sha256(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """Identifies a trace by its arrays and what else it says, in whatever order the file has them."""
    digest = hashlib.sha256()
    for name in sorted(set(metadata) - {"sha256"}):
        digest.update(f"{name} {len(metadata[name])}\n{metadata[name]}".encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype.str} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]))
    return digest.hexdigest()


def _error(path: Path, field: str, what: str) -> ResultError:
    return ResultError(f"{path}: {field}: {what}; {AGAIN}")
