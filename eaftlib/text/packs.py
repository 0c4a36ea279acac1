"""Packs of conversations: where they are found, which rows are read, and how rows become blocks of tokens."""

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import PackError
from .harmony import completion_spans

UNION = "UNION"
ROW_SPLITS = ("all", "calib", "eval")
KAGGLE_INPUT = Path("/kaggle/input")
_ROWS_PER_READ = 256


@dataclass(frozen=True)
class Blocks:
    """Rows of one pack cut into dense blocks.

    tokens: int32 [num_blocks, seq_len]. kept: bool [num_blocks, seq_len], true where a token is scored: it overlaps a
    completion span and is not the first of its block. rows_sha256 covers the UTF-8 bytes of the ``rows_seen`` rows that
    the blocks were cut from, each followed by a zero byte.
    """

    pack: str
    rows: str
    tokens: np.ndarray
    kept: np.ndarray
    rows_seen: int
    rows_sha256: str

    @property
    def seq_len(self) -> int:
        return self.tokens.shape[1]


class PackSource:
    """The packs of one source, each a parquet file with a string column ``text``; a pack's name is its file's stem."""

    def __init__(self, source: str, pack_files: list[str] | None = None):
        """source: a local folder, ``owner/name`` of a Kaggle mount or of a data set on the Hugging Face hub.

        pack_files: paths inside the source, in the order that UNION takes them; None means every parquet file, sorted.
        Raises PackError when the source, a file, or the column is not there.
        """
        self.source = source
        self.files = _find_files(source, pack_files)
        self.pack_files = list(self.files)
        names = [Path(f).stem for f in self.files]
        if len(set(names)) < len(names):
            raise PackError(f"{source}: two pack files share a name: {names}. Rename one; a pack's name is its stem.")
        self._paths = dict(zip(names, self.files.values(), strict=True))
        for path in self._paths.values():
            _check_text_column(path)

    @property
    def names(self) -> list[str]:
        """Every pack's name, then UNION."""
        return [*self._paths, UNION]

    def rows(self, pack: str, split: str = "all") -> Iterator[str]:
        """Rows of a pack, or of UNION: the packs' rows taken in turn, a finished pack skipped.

        Rows that are empty or not strings are skipped. split ``calib`` / ``eval`` keeps the rows whose SHA-256 begins
        with a byte >= 128 / < 128.
        """
        if split not in ROW_SPLITS:
            raise PackError(f"rows: found {split!r}, expected one of {ROW_SPLITS}")
        if pack == UNION:
            turns = itertools.zip_longest(*map(_read_column, self._paths.values()))
            candidates: Iterable = itertools.chain.from_iterable(turns)
        elif pack in self._paths:
            candidates = _read_column(self._paths[pack])
        else:
            raise PackError(f"pack {pack!r} is not in {self.source}; it has {self.names}")
        for text in candidates:
            if isinstance(text, str) and text and _in_split(text, split):
                yield text


def pack_blocks(
    source: PackSource, pack: str, tokenizer, *, seq_len: int, num_blocks: int, rows: str = "all"
) -> Blocks:
    """Tokenise whole rows, join them with one EOS after each, and cut the first ``num_blocks`` blocks of ``seq_len``.

    Raises PackError when the rows do not fill the blocks or no token of them lies in a completion span.
    """
    for part in source.names[:-1] if pack == UNION else [pack]:
        _require_spans(source, part, rows)
    wanted = seq_len * num_blocks
    tokens, kept = np.empty(wanted, np.int32), np.zeros(wanted, bool)
    digest, rows_seen, filled = hashlib.sha256(), 0, 0
    for text, ids, offsets in _tokenized(source.rows(pack, rows), tokenizer):
        digest.update(text.encode() + b"\0")
        rows_seen += 1
        row_ids = np.append(ids, tokenizer.eos_token_id)
        row_kept = np.append(overlaps(offsets, completion_spans(text)), False)
        end = min(filled + len(row_ids), wanted)
        tokens[filled:end], kept[filled:end] = row_ids[: end - filled], row_kept[: end - filled]
        filled = end
        if filled == wanted:
            break
    if filled < wanted:
        raise PackError(
            f"pack {pack} (rows: {rows}) of {source.source} fills {filled // seq_len} blocks of {seq_len} tokens from "
            f"{rows_seen} rows; {num_blocks} were asked for. Lower num_blocks or add rows."
        )
    tokens, kept = tokens.reshape(num_blocks, seq_len), kept.reshape(num_blocks, seq_len)
    kept[:, 0] = False  # nothing in its block predicts the first token
    if not kept.any():
        raise PackError(f"pack {pack} of {source.source}: no token of the first {num_blocks} blocks is an assistant's")
    return Blocks(pack, rows, tokens, kept, rows_seen, digest.hexdigest())


def _require_spans(source: PackSource, pack: str, rows: str) -> None:
    if not any(completion_spans(text) for text in source.rows(pack, rows)):
        raise PackError(
            f"pack {pack} (rows: {rows}) of {source.source}: no row has an assistant message closed by <|end|>, <|call|> or "
            "<|return|>, so there is nothing to score. Is the text in Harmony format?"
        )


def overlaps(offsets: np.ndarray, spans: list[tuple[int, int]]) -> np.ndarray:
    """bool [T]: whether each token's character range (offsets [T, 2]) shares a character with a span (disjoint, ascending)."""
    if not spans:
        return np.zeros(len(offsets), bool)
    span_starts, span_ends = np.array(spans).T
    token_starts, token_ends = offsets[:, 0], offsets[:, 1]
    nearest = np.searchsorted(span_ends, token_starts, side="right")  # first span that ends after the token starts
    inside = nearest < len(spans)
    nearest = np.minimum(nearest, len(spans) - 1)
    return inside & (span_starts[nearest] < token_ends) & (token_ends > token_starts)


def _tokenized(rows: Iterable[str], tokenizer) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    rows = iter(rows)
    while batch := list(itertools.islice(rows, _ROWS_PER_READ)):
        encoded = tokenizer(batch, add_special_tokens=False, return_offsets_mapping=True)
        for text, ids, offsets in zip(batch, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            yield text, np.array(ids, np.int32), np.array(offsets, np.int64).reshape(-1, 2)


def _in_split(text: str, split: str) -> bool:
    if split == "all":
        return True
    return (hashlib.sha256(text.encode()).digest()[0] >= 128) == (split == "calib")


def _read_column(path: Path) -> Iterator[object]:
    for batch in pq.ParquetFile(path).iter_batches(_ROWS_PER_READ, columns=["text"]):
        yield from batch.column(0).to_pylist()


def _check_text_column(path: Path) -> None:
    try:
        schema = pq.read_schema(path)
    except pa.ArrowInvalid as error:
        raise PackError(f"{path} is not a readable parquet file ({error}). Fetch it again.") from error
    found = {name: str(schema.field(name).type) for name in schema.names}
    if found.get("text") not in ("string", "large_string", "string_view"):
        raise PackError(f"{path}: expected a string column 'text', found columns {found}")


def _find_files(source: str, pack_files: list[str] | None) -> dict[str, Path]:
    """Path inside the source -> local path."""
    folder = Path(source) if Path(source).is_dir() else _kaggle_mount(source)
    if folder is None:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
            raise PackError(f"packs: {source!r} is neither a folder nor an 'owner/name' of a data set")
        return _fetch_from_hub(source, pack_files)
    found = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.parquet")) if pack_files is None else pack_files
    if not found:
        raise PackError(
            f"packs: {folder} has no parquet file" if pack_files is None else "pack_files: the list is empty"
        )
    for name in found:
        if not (folder / name).is_file():
            there = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.parquet"))
            raise PackError(f"packs: {folder} has no file {name!r}; it has {there}")
    return {name: folder / name for name in found}


def _kaggle_mount(source: str) -> Path | None:
    """The mount of data set ``owner/slug``, in Kaggle's present layout or the earlier one."""
    slug = source.split("/")[-1]
    mounts = (KAGGLE_INPUT / "datasets" / source, KAGGLE_INPUT / slug)
    return next((m for m in mounts if m.is_dir()), None)


def _fetch_from_hub(repo: str, pack_files: list[str] | None) -> dict[str, Path]:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import (  # HTTPError: of whichever client the hub library uses
        EntryNotFoundError,
        HTTPError,
    )

    try:
        if pack_files is None:
            repo_files = HfApi().list_repo_files(repo, repo_type="dataset")
            pack_files = sorted(f for f in repo_files if f.endswith(".parquet"))
        # Downloads resume where an earlier one stopped and are kept in the hub's cache.
        return {f: Path(hf_hub_download(repo, f, repo_type="dataset")) for f in pack_files}
    except (EntryNotFoundError, HTTPError, OSError) as error:
        raise PackError(
            f"packs: {repo!r} is no local folder and could not be fetched from the hub: {error}. "
            "Check the name, the network and HF_TOKEN, or give a folder."
        ) from error
