"""Result files: one JSON and one per-token parquet per model, written atomically, validated on reading."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..errors import ResultError
from ..files import parse_json, read_json, sha256, typed, write_atomically, write_json
from .identity import Identity, Question
from .statistics import Tokens

_TOKEN_COLUMNS = {
    "pack": pa.dictionary(pa.int8(), pa.string()),
    "seq_len": pa.int32(),
    "block": pa.int32(),
    "position": pa.int32(),
    "nll": pa.float32(),
    "entropy": pa.float32(),
}
_ROW = {"row": pa.int32()}  # not in files of earlier versions


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

    @cached_property
    def _token_table(self) -> pa.Table | None:
        path = tokens_path(self.path)
        if not path.is_file():
            return None
        if sha256(path) != self.meta.get("tokens_sha256"):
            raise ResultError(
                f"{path} is not the file that {self.path.name} was written with (its SHA-256 differs): an evaluation was "
                "interrupted, or files of two runs were mixed. Evaluate again, or remove the parquet to use binned values."
            )
        return pq.read_table(path)

    def tokens(self, pack: str, seq_len: int) -> Tokens | None:
        """Per-token values, or None where only the JSON is at hand. Raises ResultError if they are of another run."""
        for part in self.parts:
            if (pack, seq_len) in part.entries:
                return part.tokens(pack, seq_len)
        if self._token_table is None:
            return None
        return _tokens_of(self._token_table, pack, seq_len)


def write(
    out_dir: Path, label: str, meta: dict, entries: dict[tuple[str, int], dict], tokens: dict[tuple[str, int], Tokens]
) -> Path:
    """``<label>.tokens.parquet``, then ``<label>.json``: a JSON that exists is complete. Returns its path.

    entries, tokens: by (pack, seq_len), as a Result gives them.
    """
    from .schema import SCHEMA

    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / f"{label}.json"
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
    table = pa.concat_tables(tables).unify_dictionaries()
    write_atomically(tokens_path(path), lambda temporary: pq.write_table(table, temporary, compression="zstd"))
    meta = meta | {"tokens_sha256": sha256(tokens_path(path))}
    write_json(path, {"schema": SCHEMA, "meta": meta, "packs": _by_pack(entries)})
    return path


def read(path: str | Path) -> Result:
    """Read and validate one result JSON, of this shape or the earlier one. Raises ResultError naming what is wrong."""
    from .schema import ResultFile

    path = Path(path)
    advice = "remove it if it is damaged, and run 03_evaluate"
    content = read_json(path, ResultError, advice)
    typed(content, ResultFile, str(path), ResultError, advice)
    return Result(path, content["meta"].get("label", path.stem), content)


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


def read_tokens(path: Path) -> dict[tuple[str, int], Tokens]:
    """(pack, seq_len) -> per-token values, as the file has them. Raises ResultError when it cannot be read."""
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as cause:
        raise ResultError(f"{path} cannot be read ({cause}): remove it with its JSON, and evaluate again") from cause
    if missing := set(_TOKEN_COLUMNS) - set(table.column_names):
        raise ResultError(f"{path} lacks columns {sorted(missing)}: remove it with its JSON, and evaluate again")
    keys = table.group_by(["pack", "seq_len"]).aggregate([]).to_pylist()
    return {(key["pack"], key["seq_len"]): _tokens_of(table, **key) for key in keys}


def tokens_path(result: Path) -> Path:
    return result.with_name(f"{result.stem}.tokens.parquet")


def _by_pack(entries: dict[tuple[str, int], dict]) -> list[dict]:
    packs: dict[str, dict] = {}
    for (pack, length), entry in entries.items():
        packs.setdefault(pack, {})[str(length)] = entry
    return [{"pack": pack, "seq": seq} for pack, seq in packs.items()]


def _tokens_of(table: pa.Table, pack: str, seq_len: int) -> Tokens:
    rows = table.filter((pc.field("pack") == pack) & (pc.field("seq_len") == seq_len))
    names = ("block", "position", "nll", "entropy", *(_ROW if "row" in table.column_names else ()))
    return Tokens(*(rows[name].to_numpy() for name in names))


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
    content = parse_json(path, ResultError, "remove it or run 03_evaluate again")
    return isinstance(content, dict) and "packs" in content
