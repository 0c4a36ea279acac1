"""ranking.json and saliency.parquet: made from a trace, written and read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import ParameterError, ResultError, ScoringError
from ..files import json_text, read_json, typed, write_together
from .criteria import RANDOM, RECON, criterion_scores, rank_experts, sums_by_layer
from .recon import reconstruct

if TYPE_CHECKING:  # a trace's module loads the engine
    from .trace import Trace

AGAIN = "run 01_rank (again)"
COLUMNS = {name: "int64" for name in ("layer", "expert", "count")}  # of saliency.parquet, see criteria.expert_sums
COLUMNS |= {name: "double" for name in ("gate_sum", "norm_sum", "gate_norm_sum", "norm_sq_sum", "max_activation")}
COLUMNS |= {name: "double" for name in ("eaft_gate_norm_sum", "pos_gate_norm_sum", "neg_gate_norm_sum")}
COLUMNS |= {name: "int64" for name in ("pos_count", "neg_count")}
WEIGHTED = "eaft_gate_norm_sum"  # weights may be negative


def ranking_of(
    trace: Trace, sums: pa.Table, criteria: list[str], *, settings: dict, seed: int = 0, progress: bool = True
) -> dict:
    """The content of ranking.json. settings: the weights, quantile and alignment that ``sums`` were made with.

    Raises ParameterError for ``recon`` where the trace has no Gram matrices, ScoringError where a sum is not finite.
    """
    from .schema import SCHEMA

    for name in sums.column_names:
        if not np.isfinite(sums[name].to_numpy()).all():
            raise ScoringError(f"{name}: an expert's output is NaN, Inf or overflows; run with dtype float32")
    layers, _, top_k = trace.expert.shape
    provenance = trace.provenance | settings | {"seed": seed, "saliency_sha256": sums_sha256(sums)}
    entries = {}
    for name in criteria:
        if name == RECON:
            entries[name] = _by_reconstruction(trace, progress)
            provenance["grams_sha256"] = _sha256(trace.grams, trace.router_logits)
        else:
            entries[name] = by_sums(sums, name, seed)
    provenance["sha256"] = content_sha256(provenance, entries)
    return {
        "schema": SCHEMA,
        "provenance": provenance,
        "num_layers": layers,
        "num_experts": trace.num_experts,
        "top_k": top_k,
        "criteria": entries,
    }


def by_sums(sums: pa.Table, criterion: str, seed: int) -> dict:
    """A criterion's entry: scores (None where a mean has no token) and ranking, by layer."""
    scores = criterion_scores(sums, criterion, seed)
    ranking = rank_experts(scores, None if criterion == RANDOM else sums_by_layer(sums)["count"] > 0)
    return {
        "scores": [[None if np.isnan(x) else float(x) for x in layer] for layer in scores],
        "ranking": ranking.tolist(),
    }


def _by_reconstruction(trace: Trace, progress: bool) -> dict:
    """Beside scores and ranking, by count: ``keep_sets``, ids per layer after swaps, and ``losses``, theirs per layer."""
    if trace.grams is None:
        raise ParameterError(
            "criteria: 'recon' needs Gram matrices of experts' outputs, which this trace has none of. Record it again "
            "with recon_tokens, or leave recon out."
        )
    layers = reconstruct(trace.grams, trace.router_logits, trace.expert.shape[2], progress)
    counts = layers[0].keep_sets
    return {
        "scores": [layer.scores.tolist() for layer in layers],
        "ranking": [layer.ranking.tolist() for layer in layers],
        "keep_sets": {str(n): [layer.keep_sets[n].tolist() for layer in layers] for n in counts},
        "losses": {str(n): [layer.losses[n] for layer in layers] for n in counts},
    }


def content_sha256(provenance: dict, criteria: dict) -> str:
    """Identifies a ranking by what it says and came from, also once it was written and read: JSON keeps every number."""
    of = {name: value for name, value in provenance.items() if name != "sha256"}
    return hashlib.sha256(json.dumps({"provenance": of, "criteria": criteria}, sort_keys=True).encode()).hexdigest()


def _sha256(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def sums_sha256(sums: pa.Table) -> str:
    """Identifies the sums by their values, whatever file they are in."""
    digest = hashlib.sha256()
    for name in sums.column_names:
        digest.update(name.encode() + sums[name].to_numpy().astype(np.float64).tobytes())
    return digest.hexdigest()


def write_ranking(out_dir: Path, ranking: dict, sums: pa.Table) -> None:
    """ranking.json and saliency.parquet; both are whole before one takes the place of an earlier one."""
    table = pa.BufferOutputStream()
    pq.write_table(sums, table, compression="zstd")
    contents = {"saliency.parquet": table.getvalue().to_pybytes(), "ranking.json": json_text(ranking).encode()}
    write_together(out_dir, contents)


def read_ranking(path: str | Path) -> dict:
    """ranking.json, given as the file or its folder, checked whole (see schema.py). Raises ResultError when it is not one."""
    from .schema import RankingFile

    file = Path(path) / "ranking.json" if os.path.isdir(path) else Path(path)
    ranking = read_json(file, ResultError, AGAIN)
    typed(ranking, RankingFile, f"{file}", ResultError, AGAIN)
    provenance = ranking["provenance"]
    found = content_sha256(provenance, ranking["criteria"])
    if found != provenance["sha256"]:
        raise ResultError(
            f"{file} was changed after it was written: the SHA-256 of its provenance and criteria is {found}, "
            f"provenance.sha256 says {provenance['sha256']}; {AGAIN}"
        )
    return ranking


def read_sums(ranking: str | Path, content: dict) -> pa.Table:
    """saliency.parquet beside a ranking, of which ``content`` was read. Raises ResultError when it is missing or another's."""
    file = (Path(ranking) if os.path.isdir(ranking) else Path(ranking).parent) / "saliency.parquet"
    if not os.path.isfile(file):
        raise ResultError(f"core_top_m and keep_super need {file}; copy it there or {AGAIN}")
    try:
        sums = _read_columns(file, content["num_layers"] * content["num_experts"])
    except (pa.ArrowException, OSError, UnicodeDecodeError) as cause:  # the last: names of columns
        raise ResultError(f"{file} cannot be read ({cause}): it is damaged or no parquet file; {AGAIN}") from cause
    if sums_sha256(sums) != content["provenance"]["saliency_sha256"]:
        raise ResultError(f"{file} does not belong to {ranking}: its values have another hash; {AGAIN}")
    for field, wrong in _contradictions(sums, content):
        if wrong.any():
            row = sums.slice(int(wrong.argmax()), 1).to_pylist()[0]
            raise ResultError(f"{file}: {field}: found {row}, which cannot be beside the other rows; {AGAIN}")
    return sums


def _read_columns(file: Path, rows: int) -> pa.Table:
    with pq.ParquetFile(file) as opened:
        found = [(field.name, str(field.type)) for field in opened.schema_arrow]
        if found != list(COLUMNS.items()):
            raise ResultError(f"{file}: found columns {found}, expected {list(COLUMNS.items())}; {AGAIN}")
        if opened.metadata.num_rows != rows:
            found = opened.metadata.num_rows
            raise ResultError(f"{file}: found {found} rows, expected {rows}, one for each layer and expert; {AGAIN}")
        sums = opened.read()
    for name in sums.column_names:
        if sums[name].null_count:
            raise ResultError(
                f"{file}: {name}: found {sums[name].null_count} nulls, expected a number in each row; {AGAIN}"
            )
    return sums


def _contradictions(sums: pa.Table, content: dict) -> Iterator[tuple[str, np.ndarray]]:
    """What is looked at, and in which rows it cannot be."""
    of = {name: sums[name].to_numpy() for name in sums.column_names}
    layer, expert = np.indices((content["num_layers"], content["num_experts"])).reshape(2, -1)
    yield "layer, expert", (of["layer"] != layer) | (of["expert"] != expert)
    for name in sums.column_names:
        yield name, ~np.isfinite(of[name]) | ((of[name] < 0) & (name != WEIGHTED))
    yield "pos_count, neg_count", of["pos_count"] + of["neg_count"] > of["count"]
    routed = content["provenance"]["kept_tokens"] * content["top_k"]
    yield "count", np.bincount(layer, of["count"])[layer] != routed
    for name in ("gate_sum", "norm_sum", "gate_norm_sum", "norm_sq_sum", "max_activation", "eaft_gate_norm_sum"):
        yield name, (of["count"] == 0) & (of[name] != 0)
