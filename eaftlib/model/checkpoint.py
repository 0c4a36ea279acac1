"""A checkpoint on disk: found, verified before use, and read one tensor at a time."""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

from ..errors import CheckpointError
from ..files import read_json, sha256
from . import fingerprint
from .families import FAMILIES, Family

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a safetensors file: its dtype as the format spells it, and its bytes from ``offset`` on, row-major."""

    file: Path
    dtype: str
    shape: list[int]
    offset: int
    nbytes: int


class Checkpoint:
    """An opened checkpoint. Opening reads and checks headers only; tensors are memory-mapped when they are asked for."""

    def __init__(self, model: str):
        """model: a local folder (a Kaggle mount, say) or the id of a model on the Hugging Face hub.

        Raises CheckpointError when a file or tensor is missing, truncated, of a wrong shape, or of no known family.
        """
        self.model_id = model
        self.folder = _find_folder(model)
        self.family, self.config = _read_config(self.folder)
        self._shard_of = _read_index(self.folder)
        self._headers: dict[str, dict[str, StoredTensor]] = {}
        self._shards = {file: _open_shard(self.folder / file) for file in sorted(set(self._shard_of.values()))}
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
        self._require_tokenizer_file()
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        if not tokenizer.is_fast or tokenizer.eos_token_id is None:
            raise CheckpointError(f"{self.folder}: scoring needs a fast tokenizer (for offsets) with an EOS token")
        return tokenizer

    @cached_property
    def tokenizer_sha256(self) -> str:
        return sha256(self._require_tokenizer_file())

    @cached_property
    def sha256(self) -> str:
        """Identifies the model but for its tokenizer: every byte of its weights, and its configuration."""
        return fingerprint.model_sha256(self.folder, self._shard_of)

    def tensor(self, name: str) -> torch.Tensor:
        """The stored tensor, memory-mapped on the CPU."""
        return self._shards[self._shard_of[name]].get_tensor(name)

    def location(self, name: str) -> "StoredTensor":
        """Where the tensor's bytes lie on disk, for copying them without decoding."""
        file = self._shard_of[name]
        if file not in self._headers:
            self._headers[file] = _read_header(self.folder / file)
        return self._headers[file][name]

    def shape(self, name: str) -> list[int]:
        return self._slice(name).get_shape()

    def _require_tokenizer_file(self) -> Path:
        file = self.folder / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(f"{self.folder} has no tokenizer.json; copy the model's tokenizer files there")
        return file

    def _slice(self, name: str):
        return self._shards[self._shard_of[name]].get_slice(name)

    def _verify(self) -> None:
        """Every tensor of the architecture is there, with the shape that the configuration implies."""
        stored = {file: set(shard.keys()) for file, shard in self._shards.items()}
        for name, file in self._shard_of.items():
            if name not in stored[file]:
                raise CheckpointError(
                    f"{self.folder}: {INDEX_FILE} places {name!r} in {file}, which does not hold it. "
                    "Fetch the checkpoint again."
                )
        for name, expected in self.family.shapes(self.config, self._shard_of).items():
            if name not in self._shard_of:
                raise CheckpointError(f"{self.folder}: tensor {name!r} is missing from the index. Fetch it again.")
            found = self.shape(name)
            if found != expected:
                raise CheckpointError(
                    f"{self.folder}: tensor {name!r} has shape {found}, expected {expected} from config.json "
                    f"({self.family.experts_key} {self.num_experts}). Weights and configuration do not belong together."
                )


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """A safetensors file begins with the header's length (8 bytes, little-endian) and a JSON header."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(path, entry["dtype"], entry["shape"], 8 + length + start, end - start)
        for name, entry in header.items()
        for start, end in [entry["data_offsets"]]
    }


def _find_folder(model: str) -> Path:
    if Path(model).is_dir():
        return Path(model)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
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


def _read_config(folder: Path) -> tuple[Family, PreTrainedConfig]:
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} has no config.json: it is not a Hugging Face checkpoint")
    settings = read_json(file, CheckpointError, "fetch the checkpoint again")
    family = FAMILIES.get(settings.get("model_type"))
    if family is None:
        known = (f"{kind!r} ({of})" for family in FAMILIES.values() for kind, of in family.model_types.items())
        raise CheckpointError(f"{folder}: model_type is {settings.get('model_type')!r}; supported: {'; '.join(known)}")
    return family, family.config_class.from_dict(settings)


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> shard file."""
    index = folder / INDEX_FILE
    if index.is_file():
        shard_of = read_json(index, CheckpointError, "fetch the checkpoint again").get("weight_map")
        if not isinstance(shard_of, dict):
            raise CheckpointError(f"{index} has no weight_map; fetch the checkpoint again")
        for file in sorted(set(shard_of.values())):
            if not (folder / file).is_file():
                missing = sum(f == file for f in shard_of.values())
                raise CheckpointError(f"{folder}: shard {file} is missing ({missing} tensors). Fetch it again.")
        return shard_of
    if (folder / SINGLE_FILE).is_file():
        return dict.fromkeys(_open_shard(folder / SINGLE_FILE).keys(), SINGLE_FILE)
    raise CheckpointError(f"{folder} has neither {INDEX_FILE} nor {SINGLE_FILE}: there are no weights to read")


def _open_shard(path: Path):
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) is truncated or damaged: {error}. Fetch it again."
        ) from error
