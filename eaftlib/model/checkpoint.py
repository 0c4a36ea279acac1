"""A checkpoint on disk: found, verified before use, and read one tensor at a time."""

import os
import re
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from ..errors import CheckpointError
from ..files import HUB_NAME, read_json, sha256
from . import fingerprint, mxfp4, tokenizers, values
from .settings import read_config
from .shards import ADVICE, DTYPES, StoredTensor, read_header

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
FLOATING = tuple(name for name, dtype in DTYPES.items() if dtype in values.FLOATING)


class Checkpoint:
    """An opened checkpoint. Opening reads and checks headers only; tensors are read when they are asked for."""

    def __init__(self, model: str):
        """model: a local folder (a Kaggle mount, say) or the id of a model on the Hugging Face hub.

        Raises CheckpointError when a file or tensor is missing, too much, truncated, of a wrong shape or type, or of no known
        family.
        """
        self.model_id = model
        self.folder = _find_folder(model)
        self.family, self.config = read_config(self.folder)
        self._shard_of, self.shards = _read_index(self.folder)
        self._tensors = {name: self.shards[file][name] for name, file in self._shard_of.items()}
        self._verify()

    def __reduce__(self):
        known = {"sha256": self.sha256, "tokenizer_sha256": self.tokenizer_sha256}
        return Checkpoint, (self.model_id,), known  # another process opens it anew, but hashes nothing

    @property
    def revision(self) -> str | None:
        """The commit on the hub that it was fetched as; None for a folder."""
        return None if Path(self.model_id).is_dir() else self.folder.name

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def num_experts(self) -> int:
        return getattr(self.config, self.family.experts_key)

    @property
    def top_k(self) -> int:
        return getattr(self.config, self.family.top_k_key)

    @property
    def names(self) -> list[str]:
        """Tensor names in the index's order."""
        return list(self._shard_of)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Raises CheckpointError unless every token that it can give has a row in the model's embedding."""
        return tokenizers.read(self.folder, self.config.vocab_size)

    @cached_property
    def tokenizer_sha256(self) -> str:
        return sha256(tokenizers.require_file(self.folder))

    @cached_property
    def sha256(self) -> str:
        """Identifies the model but for its tokenizer: every byte of its weights, and its configuration."""
        return fingerprint.model_sha256(self.folder, self._shard_of)

    def tensor(self, name: str, pinned: bool = False) -> torch.Tensor:
        """The stored tensor, read into memory of the CPU; ``pinned``: such that a GPU can fetch it by itself."""
        return self._tensors[name].read(pinned)

    def location(self, name: str) -> StoredTensor:
        """Where the tensor's bytes lie on disk, for copying them without decoding."""
        return self._tensors[name]

    def shape(self, name: str) -> list[int]:
        return self._tensors[name].shape

    def _verify(self) -> None:
        """The tensors of the architecture are there, and no others, each of the shape and type that it must have."""
        expected = self.family.shapes(self.config, self._shard_of)
        for name, shape in expected.items():
            if name not in self._tensors:
                raise CheckpointError(f"{self.folder}: tensor {name!r} is missing from the index. Fetch it again.")
            self._require(name, shape)
        if foreign := [name for name in self._tensors if name not in expected]:
            raise CheckpointError(
                f"{self.folder}: {self._foreign(foreign)}. Weights and configuration do not belong together."
            )
        self._require_one_type()

    def _require(self, name: str, shape: list[int]) -> None:
        found = self._tensors[name]
        if found.shape != shape:
            raise CheckpointError(
                f"{self.folder}: tensor {name!r} has shape {found.shape}, expected {shape} from config.json "
                f"({self.family.experts_key} {self.num_experts}). Weights and configuration do not belong together."
            )
        allowed = ("U8",) if mxfp4.is_part(name) else FLOATING
        if found.dtype not in allowed:
            raise CheckpointError(
                f"{self.folder}: tensor {name!r} is stored as {found.dtype}, expected {' or '.join(allowed)}; {ADVICE}"
            )

    def _foreign(self, names: list[str]) -> str:
        """What there is to say of tensors that the architecture does not have."""
        first, more = names[0], f" ({len(names) - 1} more such tensors)" if names[1:] else ""
        if first == self.family.lm_head:
            return f"{first!r} is stored, but config.json has tie_word_embeddings true: one of the two would be ignored"
        beyond = first.startswith(self.family.prefix(self.num_layers))
        why = f"num_hidden_layers is {self.num_layers}" if beyond else "the architecture has no such tensor"
        return f"tensor {first!r} is stored, but {why}{more}"

    def _require_one_type(self) -> None:
        """One type of 16 bits in all of a checkpoint, the one that config.json states; float32 may stand beside it.

        bfloat16 and float16 can be read as each other without an error, and no one stores both: a tensor that differs from the
        rest has a header that lies. Routers and norms in float32 beside bfloat16 are usual.
        """
        first: dict[str, str] = {}
        for name, tensor in self._tensors.items():
            if tensor.dtype in ("BF16", "F16"):
                first.setdefault(tensor.dtype, name)
        if len(first) == 2:
            raise CheckpointError(
                f"{self.folder}: {first['BF16']!r} is stored as BF16, {first['F16']!r} as F16; expected one of the two in all "
                f"of a checkpoint; {ADVICE}"
            )
        stated = self.config.dtype
        for dtype, name in first.items():
            if stated in (torch.bfloat16, torch.float16) and DTYPES[dtype] != stated:
                raise CheckpointError(
                    f"{self.folder}: tensor {name!r} is stored as {dtype}, config.json states "
                    f"{str(stated).removeprefix('torch.')}; {ADVICE}, or correct dtype there if the weights are right"
                )


def _find_folder(model: str) -> Path:
    if os.path.isdir(model):
        return Path(model)
    if not re.fullmatch(HUB_NAME, model):
        raise CheckpointError(f"model: {model!r} is neither a folder nor an 'owner/name' of the Hugging Face hub")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        # A connection that breaks is taken up again; a later run fetches only the files that are not whole. original/ and
        # metal/ hold the same weights in other layouts.
        return Path(snapshot_download(model, ignore_patterns=["original/*", "metal/*"]))
    except (HTTPError, OSError, HFValidationError, RuntimeError) as error:
        # RuntimeError: of Xet, the storage that the client prefers
        raise CheckpointError(
            f"model: {model!r} is no local folder and could not be fetched from the hub: {error}. "
            "Check the name, the network and HF_TOKEN, or give a folder."
        ) from error


def _read_index(folder: Path) -> tuple[dict[str, str], dict[str, dict[str, StoredTensor]]]:
    """Tensor name -> shard file; shard file -> what its header holds."""
    index = folder / INDEX_FILE
    if not index.exists():
        if not (folder / SINGLE_FILE).exists():
            raise CheckpointError(f"{folder} has neither {INDEX_FILE} nor {SINGLE_FILE}: there are no weights to read")
        header = read_header(folder / SINGLE_FILE)
        return dict.fromkeys(header, SINGLE_FILE), {SINGLE_FILE: header}
    shard_of = read_json(index, CheckpointError, ADVICE).get("weight_map")
    if not isinstance(shard_of, dict):
        raise CheckpointError(f"{index} has no weight_map; {ADVICE}")
    for name, file in shard_of.items():
        _require_shard(index, name, file, shard_of)
    shards = {file: read_header(folder / file) for file in sorted(set(shard_of.values()))}
    for name, file in shard_of.items():
        if name not in shards[file]:
            raise CheckpointError(
                f"{folder}: {INDEX_FILE} places {name!r} in {file}, which does not hold it. Fetch the checkpoint again."
            )
    return shard_of, shards


def _require_shard(index: Path, name: str, file: object, shard_of: dict) -> None:
    """What the index gives for a tensor is a file beside it: a path would lead out of the checkpoint."""
    if not isinstance(file, str) or file in ("", ".", "..") or file != os.path.basename(file) or "\0" in file:
        raise CheckpointError(f"{index} places {name!r} in {file!r}, expected the name of a file beside it; {ADVICE}")
    if not os.path.isfile(index.parent / file):
        missing = sum(f == file for f in shard_of.values())
        raise CheckpointError(f"{index.parent}: shard {file} is missing ({missing} tensors). Fetch it again.")
