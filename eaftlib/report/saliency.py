"""What rankings say of every expert, for a heat map with the kept ones marked."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..pruning.ranking import read_ranking


@dataclass(frozen=True)
class Saliency:
    """One criterion of a ranking file.

    scores: [L][E], None where no token came; ranking: expert ids, best first, [L][E]. keep_sets: by count, the ids per layer
    of keep-sets that are not the best of ``ranking``.
    """

    source: str
    model_id: str
    criterion: str
    scores: list[list[float | None]]
    ranking: list[list[int]]
    keep_sets: dict[int, list[list[int]]]


def read_saliencies(paths: Iterable[str | Path]) -> tuple[Saliency, ...]:
    """Every criterion of every ranking.json, given as the file or its folder. Raises ResultError when one is none."""
    found = []
    for path in paths:
        content = read_ranking(path)
        for name, entry in content["criteria"].items():
            keep_sets = {int(count): ids for count, ids in entry.get("keep_sets", {}).items()}
            model_id = content["provenance"]["model_id"]
            found.append(Saliency(str(path), model_id, name, entry["scores"], entry["ranking"], keep_sets))
    return tuple(found)
