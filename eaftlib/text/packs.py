"""Packs of conversations: where they are found, which rows are read, and how rows become blocks of tokens."""

import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import PackError
from ..files import HUB_NAME, require_file

UNION = "UNION"
ROW_SPLITS = ("all", "calib", "eval")
KAGGLE_INPUT = Path("/kaggle/input")
_BATCH_ROWS, _BATCH_CHARACTERS = 256, 1 << 18  # tokenised at once; a token takes some hundred bytes while it is
_MOST_TOKENS = 2**31 - 1  # of all blocks: places among them are counted in int32
_UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError)  # what reading a damaged file may raise

Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class Blocks:
    """Rows of one pack cut into dense blocks.

    tokens: int32 [num_blocks, seq_len]. kept: bool [num_blocks, seq_len], true where a token is scored: it overlaps a
    completion span and is not the first of its block. rows_sha256 covers the UTF-8 bytes of the ``rows_seen`` rows that
    the blocks were cut from, each followed by a zero byte. row: int32 [num_blocks, seq_len], whose token each is, by the order
    in which rows were read; None for blocks that were not cut from rows.
    """

    pack: str
    rows: str
    tokens: np.ndarray
    kept: np.ndarray
    rows_seen: int
    rows_sha256: str
    row: np.ndarray | None = None

    @property
    def seq_len(self) -> int:
        return self.tokens.shape[1]

    def take(self, blocks: np.ndarray | slice) -> "Blocks":
        """Some of the blocks, by id; what was read for all stays as it is."""
        row = None if self.row is None else self.row[blocks]
        return replace(self, tokens=self.tokens[blocks], kept=self.kept[blocks], row=row)

    @property
    def input_sha256(self) -> str:
        """What the model is given and what is scored of it: over the shape, the token ids (int32) and the kept mask (bytes).

        A changed tokenizer, EOS token or packing shows here, whatever its cause.
        """
        digest = hashlib.sha256(f"{self.tokens.shape}".encode())
        digest.update(np.ascontiguousarray(self.tokens, "<i4").ravel())  # as they lie: no copy
        digest.update(np.ascontiguousarray(self.kept).ravel())
        return digest.hexdigest()


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
        _require_names(source, names)
        self._paths = dict(zip(names, self.files.values(), strict=True))
        for path in self._paths.values():
            _require_text(path)

    @property
    def names(self) -> list[str]:
        """Every pack's name, then UNION."""
        return [*self._paths, UNION]

    def rows(self, pack: str, split: str = "all") -> Iterator[str]:
        """Rows of a pack, or of UNION: the packs' rows taken in turn, a finished pack skipped.

        Rows that are empty or not strings are skipped. split ``calib`` / ``eval`` keeps the rows whose SHA-256 begins
        with a byte >= 128 / < 128. Rows are streamed: in memory are a few of each pack.
        """
        return _in_turn(self.parts(pack, split).values())

    def parts(self, pack: str, split: str = "all") -> dict[str, Iterator[str | None]]:
        """The rows of every pack that ``pack`` consists of, by name; None for a row that is skipped when its turn comes."""
        if split not in ROW_SPLITS:
            raise PackError(f"rows: found {split!r}, expected one of {ROW_SPLITS}")
        if pack not in self.names:
            raise PackError(f"pack {pack!r} is not in {self.source}; it has {self.names}")
        return {name: _read(path, split) for name, path in self._paths.items() if pack in (name, UNION)}


def pack_blocks(
    source: PackSource,
    pack: str,
    tokenizer,
    spans: Callable[[str], Spans],
    *,
    seq_len: int,
    num_blocks: int,
    rows: str = "all",
) -> Blocks:
    """Tokenise whole rows, join them with one EOS after each, and cut the first ``num_blocks`` blocks of ``seq_len``.

    spans: the completion spans of a row, as character ranges [start, end), ascending and disjoint. No row is read twice,
    and reading stops with the batch that fills the blocks; but where none of the rows read of a pack (for UNION: of any of
    its packs) has a span, that pack is read on to its first that has. Raises PackError when there is none to its end,
    when the rows do not fill the blocks, or when no token of the blocks lies in a completion span.
    """
    parts = {name: _Part(texts, spans) for name, texts in source.parts(pack, rows).items()}
    wanted = seq_len * num_blocks
    if wanted > _MOST_TOKENS:
        raise PackError(
            f"num_blocks x seq_len: found {num_blocks} x {seq_len} tokens, expected at most {_MOST_TOKENS}; lower one of them"
        )
    tokens, kept, of_row = np.empty(wanted, np.int32), np.zeros(wanted, bool), np.empty(wanted, np.int32)
    digest, rows_seen, filled = hashlib.sha256(), 0, 0
    for row, ids, offsets in _tokenized(_in_turn(parts.values()), tokenizer):
        digest.update(row.text.encode() + b"\0")
        row_ids = np.append(ids, tokenizer.eos_token_id)
        row_kept = np.append(overlaps(offsets, row.spans), False)
        end = min(filled + len(row_ids), wanted)
        tokens[filled:end], kept[filled:end] = row_ids[: end - filled], row_kept[: end - filled]
        of_row[filled:end] = rows_seen
        rows_seen += 1
        filled = end
        if filled == wanted:
            break
    _require_spans(source, parts, rows)
    if filled < wanted:
        raise PackError(
            f"pack {pack} (rows: {rows}) of {source.source} fills {filled // seq_len} blocks of {seq_len} tokens from "
            f"{rows_seen} rows; {num_blocks} were asked for. Lower num_blocks or add rows."
        )
    tokens, kept = tokens.reshape(num_blocks, seq_len), kept.reshape(num_blocks, seq_len)
    kept[:, 0] = False  # nothing in its block predicts the first token
    if not kept.any():
        raise PackError(f"pack {pack} of {source.source}: no token of the first {num_blocks} blocks is an assistant's")
    return Blocks(pack, rows, tokens, kept, rows_seen, digest.hexdigest(), of_row.reshape(num_blocks, seq_len))


def overlaps(offsets: np.ndarray, spans: Spans) -> np.ndarray:
    """bool [T]: whether each token's character range (offsets [T, 2]) shares a character with a span (disjoint, ascending)."""
    if not spans:
        return np.zeros(len(offsets), bool)
    span_starts, span_ends = np.array(spans).T
    token_starts, token_ends = offsets[:, 0], offsets[:, 1]
    nearest = np.searchsorted(span_ends, token_starts, side="right")  # first span that ends after the token starts
    inside = nearest < len(spans)
    nearest = np.minimum(nearest, len(spans) - 1)
    return inside & (span_starts[nearest] < token_ends) & (token_ends > token_starts)


class _Row(NamedTuple):
    text: str
    spans: Spans


class _Part:
    """A pack's rows with their spans, each read once; None where a row is skipped."""

    def __init__(self, texts: Iterator[str | None], spans: Callable[[str], Spans]):
        self._rows = (_Row(text, spans(text)) if text else None for text in texts)
        self._had_spans = False

    def __iter__(self) -> Iterator[_Row | None]:
        for row in self._rows:
            self._had_spans |= row is not None and bool(row.spans)
            yield row

    def has_spans(self) -> bool:
        """Whether a row that was read had a span, else whether one of the others has; reads on to the first that has."""
        return self._had_spans or any(row and row.spans for row in self._rows)


def _require_spans(source: PackSource, parts: dict[str, _Part], rows: str) -> None:
    for name, part in parts.items():
        if not part.has_spans():
            raise PackError(
                f"pack {name} (rows: {rows}) of {source.source}: no row has an assistant message that is closed, so there "
                "is nothing to score. Is the text in the model's chat format?"
            )


def _in_turn(parts: Iterable[Iterable]) -> Iterator:
    """One item of each part, then the next of each; a finished part and None are passed over."""
    return filter(None, itertools.chain.from_iterable(itertools.zip_longest(*parts)))


def _tokenized(rows: Iterable[_Row], tokenizer) -> Iterator[tuple[_Row, np.ndarray, np.ndarray]]:
    for batch in _batches(rows):
        texts = [row.text for row in batch]
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        for row, ids, offsets in zip(batch, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            yield row, np.array(ids, np.int32), np.array(offsets, np.int64).reshape(-1, 2)


def _batches(rows: Iterable[_Row]) -> Iterator[list[_Row]]:
    """Runs of rows; one ends with the row that brings it to its count or its characters."""
    batch, characters = [], 0
    for row in rows:
        batch.append(row)
        characters += len(row.text)
        if len(batch) == _BATCH_ROWS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _in_split(text: str, split: str) -> bool:
    if split == "all":
        return True
    return (hashlib.sha256(text.encode()).digest()[0] >= 128) == (split == "calib")


def _read(path: Path, split: str) -> Iterator[str | None]:
    from .row_stream import stream_text

    read = 0
    try:
        expected = pq.read_metadata(path).num_rows
        for text in stream_text(path):
            read += 1
            yield text if text and _in_split(text, split) else None
    except _UNREADABLE as cause:
        raise PackError(f"{path} cannot be read on from row {read} ({cause}). Fetch it again.") from cause
    if read != expected:
        raise PackError(f"{path} gave {read} rows, its footer says {expected}: it is damaged. Fetch it again.")


def _require_names(source: str, names: list[str]) -> None:
    if len(set(names)) < len(names):
        raise PackError(f"{source}: two pack files share a name: {names}. Rename one; a pack's name is its stem.")
    for name in names:
        if name == UNION:
            raise PackError(f"{source}: a pack file is named {UNION}, as all packs together are. Rename it.")
        if not re.fullmatch(r"[\w.+-]([\w .+-]*[\w.+-])?", name):
            raise PackError(
                f"{source}: found {name!r} for a pack's name, expected letters, digits, '_', '.', '+', '-' and spaces within. "
                "Rename the file."
            )


def _require_text(path: Path) -> None:
    """A parquet file with rows and a string column ``text``; only its footer is read."""
    require_file(path, PackError, "name a parquet file")
    try:
        footer = pq.read_metadata(path)
        found = [(field.name, str(field.type)) for field in footer.schema.to_arrow_schema()]
    except _UNREADABLE as cause:
        raise PackError(f"{path} is not a readable parquet file ({cause}). Fetch it again.") from cause
    of_text = [kind for name, kind in found if name == "text"]
    if len(of_text) != 1 or of_text[0] not in ("string", "large_string", "string_view"):
        raise PackError(f"{path}: expected one string column 'text', found columns {found}")
    if not footer.num_rows:
        raise PackError(f"{path} has no rows; leave it out, or fetch it again")


def _find_files(source: str, pack_files: list[str] | None) -> dict[str, Path]:
    """Path inside the source -> local path."""
    folder = Path(source) if Path(source).is_dir() else _kaggle_mount(source)
    if folder is None:
        if not re.fullmatch(HUB_NAME, source):
            raise PackError(f"packs: {source!r} is neither a folder nor an 'owner/name' of a data set")
        return _fetch_from_hub(source, pack_files)
    found = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.parquet")) if pack_files is None else pack_files
    if not found:
        raise PackError(
            f"packs: {folder} has no parquet file" if pack_files is None else "pack_files: the list is empty"
        )
    for name in found:
        if not (folder / name).exists():
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
        HFValidationError,
        HTTPError,
    )

    try:
        if pack_files is None:
            repo_files = HfApi().list_repo_files(repo, repo_type="dataset")
            pack_files = sorted(f for f in repo_files if f.endswith(".parquet"))
        # Fetched whole, not streamed over the network: the next run of the evening finds the file in the hub's cache,
        # and a connection that breaks is taken up where it broke.
        return {f: Path(hf_hub_download(repo, f, repo_type="dataset")) for f in pack_files}
    except (EntryNotFoundError, HFValidationError, HTTPError, OSError, RuntimeError) as error:
        # RuntimeError: of Xet, the storage that the client prefers
        raise PackError(
            f"packs: {repo!r} is no local folder and could not be fetched from the hub: {error}. "
            "Check the name, the network and HF_TOKEN, or give a folder."
        ) from error
