"""ranking.json and saliency.parquet: made from a trace, written and read."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import ParameterError, ResultError
from ..files import read_json, typed, write_atomically, write_json
from .criteria import RANDOM, RECON, criterion_scores, rank_experts, sums_by_layer
from .recon import reconstruct

if TYPE_CHECKING:  # a trace's module loads the engine
    from .trace import Trace

AGAIN = "run 01_rank (again)"


def ranking_of(
    trace: Trace, sums: pa.Table, criteria: list[str], *, settings: dict, seed: int = 0, progress: bool = True
) -> dict:
    """The content of ranking.json. settings: the weights, quantile and alignment that ``sums`` were made with.

    Raises ParameterError for ``recon`` where the trace has no Gram matrices.
    """
    from .schema import SCHEMA

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
    """ranking.json and saliency.parquet."""
    out_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(
        out_dir / "saliency.parquet", lambda temporary: pq.write_table(sums, temporary, compression="zstd")
    )
    write_json(out_dir / "ranking.json", ranking)


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


def read_sums(ranking: str | Path, provenance: dict) -> pa.Table:
    """saliency.parquet beside a ranking. Raises ResultError when it is missing or not the ranking's."""
    folder = Path(ranking) if Path(ranking).is_dir() else Path(ranking).parent
    file = folder / "saliency.parquet"
    if not file.is_file():
        raise ResultError(f"core_top_m and keep_super need {file}; copy it there or run 01_rank again")
    sums = pq.read_table(file)
    if sums_sha256(sums) != provenance["saliency_sha256"]:
        raise ResultError(f"{file} does not belong to {ranking}: its values have another hash. Run 01_rank again.")
    return sums
