"""Result files: one JSON and one per-token parquet per model, written atomically, validated on reading."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..errors import ResultError
from ..files import json_text, parse_json, read_json, require_file, sha256, typed, write_together
from . import reconcile
from .identity import Identity, Question
from .statistics import Tokens

_TOKEN_COLUMNS = {
    "pack": pa.dictionary(pa.int32(), pa.string()),
    "seq_len": pa.int32(),
    "block": pa.int32(),
    "position": pa.int32(),
    "nll": pa.float32(),
    "entropy": pa.float32(),
}
_ROW = {"row": pa.int32()}  # not in files of earlier versions
_HELD = 4  # token files in memory at once: a baseline's and a candidate's, each of which may be two parts
_ADVICE = "remove it if it is damaged, and run 03_evaluate"
_EVALUATE = "remove it with what belongs to it, and evaluate again"


@dataclass(frozen=True)
class Result:
    """One model's result as read from disk. ``content`` has the file's shape, see docs/metrics.md.

    parts: the results it was put together from, where runs of one model at several sequence lengths were merged.
    """

    path: Path
    label: str
    content: dict
    parts: tuple["Result", ...] = ()

    @property
    def meta(self) -> dict:
        return self.content["meta"]

    @property
    def binned(self) -> bool:
        """Whether thresholds come from histogram bins: a file of the earlier shape, without schema."""
        return "schema" not in self.content

    @property
    def entries(self) -> dict[tuple[str, int], dict]:
        """(pack, seq_len) -> {rows_seen, rows_sha256, input_sha256, model}."""
        return {
            (pack["pack"], int(length)): entry
            for pack in self.content["packs"]
            for length, entry in pack["seq"].items()
        }

    def num_blocks(self, seq_len: int) -> int | None:
        """How many blocks were scored at a length; None where an earlier file does not say."""
        return blocks_at(self.meta.get("num_blocks"), seq_len)

    def model(self, pack: str, seq_len: int) -> dict:
        """The aggregates of an entry. Raises ResultError where there are tokens and these do not give them."""
        self.tokens(pack, seq_len)
        return self.entries[pack, seq_len]["model"]

    def tokens(self, pack: str, seq_len: int) -> Tokens | None:
        """Per-token values, or None where only the JSON is at hand, or it is of the earlier shape.

        Raises ResultError if they are of another run, or do not give the aggregates that the JSON has.
        """
        for part in self.parts:
            if (pack, seq_len) in part.entries:
                return part.tokens(pack, seq_len)
        path = tokens_path(self.path)
        if self.binned or not os.path.lexists(path):
            return None
        require_file(path, ResultError, _EVALUATE)
        found = _tokens_of(self._table(path), path, pack, seq_len, self.num_blocks(seq_len))
        if (pack, seq_len) not in self._agreeing:
            settings = self.num_blocks(seq_len), self.meta["cc_quantile"]
            disagreements = reconcile.with_tokens(self.entries[pack, seq_len]["model"], found, *settings)
            _require_agreement(f"{self.path}: {pack} at {seq_len}", disagreements)
            self._agreeing.add((pack, seq_len))
        return found

    def require_reconciled(self) -> None:
        """Raises ResultError unless the tokens, where there are some, give every entry, and are of no others."""
        for part in self.parts or (self,):
            if any([part.tokens(*key) is not None for key in part.entries]):
                path = tokens_path(part.path)
                table = part._table(path)
                there = {(key["pack"], key["seq_len"]) for key in _keys(table)}
                if other := sorted(there - part.entries.keys()):
                    raise ResultError(
                        f"{path} has {other[0][0]} at {other[0][1]}, {part.path.name} has not; {_EVALUATE}"
                    )

    def _table(self, path: Path) -> pa.Table:
        """The whole file, of whose bytes the JSON has the hash."""
        table, digest = _read_table(path, _stamp(path))
        if digest != self.meta["tokens_sha256"]:
            raise ResultError(
                f"{path} is not the file that {self.path.name} was written with (its SHA-256 differs): an evaluation was "
                "interrupted, or files of two runs were mixed. Evaluate again, or remove the parquet to use binned values."
            )
        return table

    @cached_property
    def _agreeing(self) -> set[tuple[str, int]]:
        """Entries that their tokens were found to give."""
        return set()


def write(
    out_dir: Path, label: str, meta: dict, entries: dict[tuple[str, int], dict], tokens: dict[tuple[str, int], Tokens]
) -> Path:
    """``<label>.tokens.parquet``, then ``<label>.json``: a JSON that exists is complete. Returns its path.

    Both are whole before the first gets its name, and the JSON's hash of the tokens is of these, never of what another process
    has put there meanwhile.

    entries, tokens: by (pack, seq_len), as a Result gives them.
    """
    from .schema import SCHEMA

    path = out_dir / f"{label}.json"
    of_tokens = _parquet(tokens)
    meta = meta | {"tokens_sha256": hashlib.sha256(of_tokens).hexdigest()}
    content = json_text({"schema": SCHEMA, "meta": meta, "packs": _by_pack(entries)})
    write_together(out_dir, {tokens_path(path).name: of_tokens, path.name: content.encode()})
    return path


def _parquet(tokens: dict[tuple[str, int], Tokens]) -> memoryview:
    tables, kinds = [], _TOKEN_COLUMNS | (_ROW if all(part.row is not None for part in tokens.values()) else {})
    for (pack, seq_len), part in tokens.items():
        columns = {
            "pack": np.full(len(part.nll), pack),
            "seq_len": np.full(len(part.nll), seq_len),
            "block": part.block,
            "position": part.position,
            "nll": part.nll,
            "entropy": part.entropy,
            "row": part.row,
        }
        tables.append(pa.table({name: pa.array(columns[name]).cast(kind) for name, kind in kinds.items()}))
    file = pa.BufferOutputStream()
    pq.write_table(pa.concat_tables(tables).unify_dictionaries(), file, compression="zstd")
    return memoryview(file.getvalue())


def read(path: str | Path) -> Result:
    """Read and validate one result JSON, of this shape or the earlier one. Raises ResultError naming what is wrong."""
    from .schema import shape_of

    path = Path(path)
    content = read_json(path, ResultError, _ADVICE)
    typed(content, shape_of(content), str(path), ResultError, _ADVICE)
    result = Result(path, content["meta"].get("label") or path.stem, content)
    for (pack, seq_len), entry in result.entries.items():
        settings = result.num_blocks(seq_len), result.meta.get("cc_quantile")
        _require_agreement(f"{path}: {pack} at {seq_len}", reconcile.with_itself(entry["model"], *settings))
    return result


def read_all(sources: list[str]) -> list[Result]:
    """Results of files and folders, in order; a folder gives every ``*.json`` in it that holds ``packs``, sorted.

    Results of one label become one where the same model was scored on other packs or sequence lengths.
    """
    found: list[Result] = []
    for source in map(Path, sources):
        if source.is_dir():
            files = [f for f in sorted(source.glob("*.json")) if holds_packs(f)]
            if not files:
                raise ResultError(f"{source} holds no result JSON; run 03_evaluate with this out_dir first")
        else:
            files = [source]
        found += map(read, files)
    by_label: dict[str, list[Result]] = {}
    for result in found:
        by_label.setdefault(result.label, []).append(result)
    return [_merged(parts) for parts in by_label.values()]


def read_tokens(path: Path, num_blocks: int | Mapping[str, int]) -> dict[tuple[str, int], Tokens]:
    """(pack, seq_len) -> per-token values, as the file has them. Raises ResultError when it cannot be read.

    num_blocks: how many were scored, as a result's ``meta`` says it.
    """
    require_file(path, ResultError, _EVALUATE)
    table, _ = _read_table(path, _stamp(path))
    return {
        (key["pack"], key["seq_len"]): _tokens_of(table, path, **key, num_blocks=blocks_at(num_blocks, key["seq_len"]))
        for key in _keys(table)
    }


def _keys(table: pa.Table) -> list[dict]:
    return table.group_by(["pack", "seq_len"]).aggregate([]).to_pylist()


def belong_together(path: Path) -> bool:
    """Whether the tokens beside a result JSON are those that it was written with: no run was killed between the two."""
    return sha256(tokens_path(path)) == read(path).meta["tokens_sha256"]


def blocks_at(num_blocks: int | Mapping[str, int] | None, seq_len: int) -> int | None:
    """Of a setting that is one number, or one for each sequence length; None where it does not say."""
    return num_blocks.get(str(seq_len)) if isinstance(num_blocks, Mapping) else num_blocks


def tokens_path(result: Path) -> Path:
    return result.with_name(f"{result.stem}.tokens.parquet")


def _by_pack(entries: dict[tuple[str, int], dict]) -> list[dict]:
    packs: dict[str, dict] = {}
    for (pack, length), entry in entries.items():
        packs.setdefault(pack, {})[str(length)] = entry
    return [{"pack": pack, "seq": seq} for pack, seq in packs.items()]


@lru_cache(_HELD)
def _read_table(path: Path, _stamp: tuple[int, ...]) -> tuple[pa.Table, str]:
    """(all rows, the file's SHA-256), of columns that are what ``write`` gives them."""
    try:
        content = path.read_bytes()
        table = pq.ParquetFile(pa.BufferReader(content)).read()
    except (OSError, pa.ArrowException) as cause:
        raise ResultError(f"{path} cannot be read ({cause}); {_EVALUATE}") from cause
    for name, kind in (_TOKEN_COLUMNS | _ROW).items():
        if table.column_names.count(name) not in ((1,) if name in _TOKEN_COLUMNS else (0, 1)):
            raise ResultError(f"{path}: expected one column {name}, found {table.column_names}; {_EVALUATE}")
        if name in table.column_names and not _is_of(table[name], kind):
            found = f"{table[name].type}, {table[name].null_count} of {table.num_rows} null"
            raise ResultError(f"{path}: column {name} is {found}; expected {kind} without a null; {_EVALUATE}")
    return table, hashlib.sha256(content).hexdigest()


def _stamp(path: Path) -> tuple[int, ...]:
    """Another where the file was written again."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _is_of(column: pa.ChunkedArray, kind: pa.DataType) -> bool:
    """Whatever the type of a dictionary's indices is."""
    types = [t.value_type if pa.types.is_dictionary(t) else t for t in (column.type, kind)]
    return types[0] == types[1] and column.null_count == 0


def _tokens_of(table: pa.Table, path: Path, pack: str, seq_len: int, num_blocks: int | None) -> Tokens:
    rows = table.filter((pc.field("pack") == pack) & (pc.field("seq_len") == seq_len))
    names = ("block", "position", "nll", "entropy", *(_ROW if "row" in table.column_names else ()))
    found = Tokens(*(rows[name].to_numpy() for name in names))
    if wrong := next(reconcile.impossible(found, seq_len, num_blocks), None):
        raise ResultError(f"{path}: {pack} at {seq_len}: {wrong}; {_EVALUATE}")
    return found


def _require_agreement(where: str, disagreements: Iterator[reconcile.Disagreement]) -> None:
    """Raises ResultError with the first."""
    if found := next(disagreements, None):
        raise ResultError(f"{where}: {found}. The file was changed or damaged; {_EVALUATE}")


def _merged(parts: list[Result]) -> Result:
    """One result of several with the same label. Raises ResultError unless they are parts of one evaluation."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if problems := _why_apart(parts):
        raise ResultError(
            f"results: label {first.label!r} occurs in {[str(part.path) for part in parts]}, and these are not one model's "
            f"results on different packs or sequence lengths: {'; '.join(problems)}. Give each model a label of its own."
        )
    entries = {key: entry for part in parts for key, entry in part.entries.items()}
    content = first.content | {"packs": _by_pack(entries)}
    return Result(first.path, first.label, content, tuple(parts))


def _why_apart(parts: list[Result]) -> list[str]:
    """What keeps results of one label from becoming one."""
    problems = [f"{part.path} is of the earlier shape" for part in parts if part.binned]
    times = Counter(key for part in parts for key in part.entries)
    problems += [f"{pack} at {length} is there {n} times" for (pack, length), n in times.items() if n > 1]
    first = Identity.of(parts[0].meta)
    found = [diff for part in parts[1:] for diff in Identity.of(part.meta).differences(first, Question.MERGEABLE)]
    return problems + list(map(str, found))


def holds_packs(path: Path) -> bool:
    """Whether a JSON is a result, or was one: it has ``packs``, or the schema of those that do."""
    from .schema import SCHEMA

    content = parse_json(path, ResultError, "remove it or run 03_evaluate again")
    return isinstance(content, dict) and ("packs" in content or content.get("schema") == SCHEMA)
