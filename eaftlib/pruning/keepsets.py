"""From a ranking to the set of experts that stay in each layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from ..errors import ParameterError, ResultError
from .criteria import sums_by_layer
from .ranking import read_ranking, read_sums

if TYPE_CHECKING:  # loads torch and transformers
    from ..model.checkpoint import Checkpoint


@dataclass(frozen=True)
class KeepSet:
    """Experts that stay: ids int64 [L, keep_n], ascending per layer, of num_experts, and how they were chosen."""

    ids: np.ndarray
    num_experts: int
    chosen_by: dict

    @property
    def keep_n(self) -> int:
        return self.ids.shape[1]

    @property
    def mask(self) -> np.ndarray:
        """bool [L, E], true where an expert stays."""
        mask = np.zeros((len(self.ids), self.num_experts), bool)
        np.put_along_axis(mask, self.ids, True, axis=1)
        return mask


def keep_count(
    num_experts: int, top_k: int, *, keep_frac: float | None = None, keep_n: int | None = None, multiple_of: int = 4
) -> int:
    """How many experts a layer keeps: ``keep_n`` or ``keep_frac`` of all, rounded up to ``multiple_of``, at most all.

    Raises ParameterError unless exactly one of the two is given and the count lies between top_k and num_experts.
    """
    if (keep_frac is None) == (keep_n is None):
        raise ParameterError(f"give exactly one of keep_n and keep_frac; found keep_n={keep_n}, keep_frac={keep_frac}")
    if multiple_of < 1:
        raise ParameterError(f"multiple_of: found {multiple_of}, expected 1 or more")
    if keep_frac is not None:
        if not 0 < keep_frac <= 1:
            raise ParameterError(f"keep_frac: found {keep_frac}, expected a share in (0, 1]")
        keep_n = math.ceil(round(keep_frac * num_experts, 9))  # 0.7 * 10 is 7, not 7.000000000000001
    if not top_k <= keep_n <= num_experts:
        raise ParameterError(
            f"keep_n: found {keep_n}; expected at least top_k = {top_k}, since every token is routed to that many, and at "
            f"most num_experts = {num_experts}"
        )
    return min(math.ceil(keep_n / multiple_of) * multiple_of, num_experts)


def choose(ranking: np.ndarray, keep_n: int, always_keep: np.ndarray | None = None) -> np.ndarray:
    """Ids [L, keep_n], ascending: all of always_keep (bool [L, E]), then the best of ranking (ids [L, E], best first)."""
    kept = []
    for layer, order in enumerate(ranking):
        core = [] if always_keep is None else np.flatnonzero(always_keep[layer])
        if len(core) > keep_n:
            raise ParameterError(f"layer {layer}: {len(core)} experts must always stay, but keep_n is {keep_n}")
        rest = order[~np.isin(order, core)]
        kept.append(np.sort(np.concatenate([core, rest[: keep_n - len(core)]]).astype(np.int64)))
    return np.stack(kept)


def kept_by(entry: dict, keep_n: int, always_keep: np.ndarray | None = None) -> tuple[np.ndarray, str]:
    """Ids [L, keep_n] by one criterion's entry of ranking.json, and which part of it said so.

    ``keep_sets``: the criterion's own for that count, where it has them (``recon``: after swaps) and nobody must stay, else
    ``ranking``: those that must and the best of the ranking.
    """
    own = entry.get("keep_sets", {}).get(str(keep_n)) if always_keep is None else None
    if own is not None:
        return np.array(own), "keep_sets"
    return choose(np.array(entry["ranking"]), keep_n, always_keep), "ranking"


def core_experts(sums: pa.Table, top_m: int) -> np.ndarray:
    """bool [L, E]: per layer the ``top_m`` experts with the largest positive mass (sum of g n over tokens with w > 0)."""
    mass = sums_by_layer(sums)["pos_gate_norm_sum"]
    if not 0 <= top_m <= mass.shape[1]:
        raise ParameterError(f"core_top_m: found {top_m}, expected 0 to {mass.shape[1]}")
    if top_m and not mass.any():
        raise ParameterError(f"core_top_m: found {top_m}, but no token of the ranking weighs more than 0; expected 0")
    best = np.argsort(-mass, axis=1, kind="stable")[:, :top_m]
    mask = np.zeros(mass.shape, bool)
    np.put_along_axis(mask, best, True, axis=1)
    return mask


def super_experts(sums: pa.Table) -> np.ndarray:
    """bool [L, E]: experts whose largest absolute output element is an outlier.

    Above the 99.5th percentile of all experts' and a tenth of the maximum, in the first three quarters of the layers.
    """
    peak = sums_by_layer(sums)["max_activation"]
    outlier = (peak > np.percentile(peak, 99.5)) & (peak > peak.max() / 10)
    outlier[math.ceil(0.75 * len(peak)) :] = False
    return outlier


def from_ranking(
    checkpoint: Checkpoint,
    *,
    ranking: str | Path,
    criterion: str,
    keep_frac: float | None = None,
    keep_n: int | None = None,
    multiple_of: int = 4,
    core_top_m: int = 0,
    keep_super: bool = False,
) -> KeepSet:
    """The keep-set of a model by one criterion of its ranking file.

    Where the criterion has a keep-set of its own for that count (``recon``: after swaps), that is it, unless core_top_m
    or keep_super say who must stay: then the ranking fills up the rest, and saliency.parquet beside it is read. Raises
    ParameterError or ResultError when the ranking is of another model, lacks the criterion, or the count is impossible.
    """
    content = read_ranking(ranking)
    _require_made_from(checkpoint, ranking, content)
    provenance = content["provenance"]
    if criterion not in content["criteria"]:
        raise ParameterError(f"criterion: found {criterion!r}; {ranking} has {sorted(content['criteria'])}")
    count = keep_count(
        checkpoint.num_experts, checkpoint.top_k, keep_frac=keep_frac, keep_n=keep_n, multiple_of=multiple_of
    )
    always = None
    if core_top_m or keep_super:
        sums = read_sums(ranking, content)
        always = core_experts(sums, core_top_m) | (keep_super & super_experts(sums))
    entry = content["criteria"][criterion]
    ids, by = kept_by(entry, count, always)
    chosen_by = {
        "criterion": criterion,
        "keep_n": count,
        "core_top_m": core_top_m,
        "keep_super": keep_super,
        "ranking_sha256": provenance["sha256"],
        "ranking_rows": provenance["rows"],
        "ranking_rows_sha256": provenance["rows_sha256"],
    }
    if "keep_sets" in entry:
        chosen_by["by"] = by
    return KeepSet(ids, checkpoint.num_experts, chosen_by)


def _require_made_from(checkpoint: Checkpoint, ranking: str | Path, content: dict) -> None:
    provenance = content["provenance"]
    for name in ("num_layers", "num_experts", "top_k"):
        found, expected = content[name], getattr(checkpoint, name)
        if found != expected:
            raise ResultError(
                f"ranking {ranking}: {name} is {found}; {checkpoint.model_id} has {expected}. It was made from "
                f"{provenance['model_id']}; run 01_rank on the model that you want to prune."
            )
    if provenance["model_sha256"] != checkpoint.sha256:
        raise ResultError(
            f"ranking {ranking} was made from {provenance['model_id']} ({provenance['model_sha256'][:12]}), not from "
            f"{checkpoint.model_id} ({checkpoint.sha256[:12]}). Run 01_rank on the model that you want to prune. (Rankings "
            "of earlier versions know a model by its routers alone and have to be made again.)"
        )
