"""The shape of ranking.json, checked whole on reading: what is there, of which type, and that it belongs together."""

from collections.abc import Iterable
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from .criteria import ALIGNMENTS, CRITERIA, MEANS, RANDOM, RECON, rank_experts
from .provenance import Finite, Id, Loss, Name, Part, Positive, Sha256, Share, TraceProvenance

SCHEMA = "eaft-ranking/1"
COUNTED = "frequency"


class Provenance(TraceProvenance):
    """What a ranking came from: a trace, and what was made of it."""

    packs: Name
    pack_files: list[Name] | None
    cc_quantile: Share
    w_good: Finite
    w_uncertain: Finite
    w_conflict: Finite
    align: Literal[*ALIGNMENTS]
    seed: Annotated[int, Field(strict=True)]
    saliency_sha256: Sha256
    grams_sha256: Sha256 | None = None
    sha256: Sha256


class Entry(Part):
    """One criterion, by layer. keep_sets, losses: by count, of ``recon`` alone."""

    scores: list[list[Finite | None]]
    ranking: list[list[Id]]
    keep_sets: dict[str, list[list[Id]]] | None = None
    losses: dict[str, list[Loss]] | None = None


class RankingFile(Part):
    schema_: Literal[SCHEMA] = Field(alias="schema")
    provenance: Provenance
    num_layers: Positive
    num_experts: Positive
    top_k: Positive
    criteria: Annotated[dict[Literal[*CRITERIA, RANDOM, RECON], Entry], Field(min_length=1)]

    @model_validator(mode="after")
    def _belongs_together(self):
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k is {self.top_k}, expected at most num_experts, {self.num_experts}")
        for name, entry in self.criteria.items():
            self._require_shape(f"criteria.{name}.scores", entry.scores)
            self._require_shape(f"criteria.{name}.ranking", entry.ranking)
            _require_permutations(f"criteria.{name}.ranking", entry.ranking)
            if name == RECON:
                self._require_reconstruction(entry)
            elif entry.keep_sets is not None or entry.losses is not None:
                raise ValueError(f"criteria.{name}: keep_sets and losses are recon's alone")
        self._require_order()
        return self

    def _require_shape(self, field: str, by_layer: list[list]) -> None:
        sizes = [len(layer) for layer in by_layer]
        if len(sizes) != self.num_layers or set(sizes) != {self.num_experts}:
            raise ValueError(
                f"{field}: found {len(sizes)} layers of {sorted(set(sizes))} experts, expected {self.num_layers} of "
                f"{self.num_experts} (num_layers, num_experts)"
            )

    def _require_reconstruction(self, entry: Entry) -> None:
        """A keep-set and losses for every count from top_k to all but one; scores that fall along the ranking."""
        if self.provenance.grams_sha256 is None:
            raise ValueError("provenance.grams_sha256: missing, although criteria has recon")
        counts = [str(count) for count in range(self.top_k, self.num_experts)]
        for field in ("keep_sets", "losses"):
            _require_counts(f"criteria.{RECON}.{field}", getattr(entry, field), counts, self.num_layers)
        for count, by_layer in entry.keep_sets.items():
            _require_ascending(f"criteria.{RECON}.keep_sets.{count}", by_layer, int(count), self.num_experts)

    def _require_order(self) -> None:
        """Each ranking is what ``rank_experts`` makes of its scores, as far as the file says who was never routed."""
        scores = {name: _array(name, entry) for name, entry in self.criteria.items()}
        sums = {name: of for name, of in scores.items() if name not in (RANDOM, RECON)}
        idle = {name: np.isnan(of) if name in MEANS else of == 0 for name, of in sums.items()}
        never = np.logical_and.reduce([*idle.values()]) if idle else None
        known = [name for name in sums if name in MEANS or name == COUNTED]
        for name in known:
            _require_each(f"criteria.{name}.scores", "who was never routed to differs", (idle[name] == never).all(1))
        if COUNTED in sums:
            right = sums[COUNTED].sum(1) == self.provenance.kept_tokens * self.top_k
            _require_each(f"criteria.{COUNTED}.scores", "they do not add up to kept_tokens x top_k", right)
        for name, of in scores.items():
            order = np.array(self.criteria[name].ranking)
            if name == RECON:  # equal losses: whoever was dropped last
                right = (np.diff(np.take_along_axis(of, order, 1)) <= 0).all(1)
            elif name == RANDOM or known:
                right = (order == rank_experts(of, None if name == RANDOM else ~never)).all(1)
            else:
                right = [_can_be_ranked(*layer) for layer in zip(of, order, never, strict=True)]
            _require_each(f"criteria.{name}.ranking", "the scores give another order", right)


def _array(name: str, entry: Entry) -> np.ndarray:
    """float64 [L, E], NaN where there is no mean; numbers that the criterion cannot give are refused."""
    scores = np.array(entry.scores, np.float64)
    if name not in MEANS:
        _require_each(f"criteria.{name}.scores", "null, where only a mean can be missing", ~np.isnan(scores).any(1))
    if not name.startswith("eaft"):  # whose weights may be negative
        _require_each(f"criteria.{name}.scores", "a negative number", ~(scores < 0).any(1))
    if name == RANDOM:
        _require_each(f"criteria.{name}.scores", "a number of 1 or more", (scores < 1).all(1))
    return scores


def _can_be_ranked(scores: np.ndarray, order: np.ndarray, maybe_never: np.ndarray) -> bool:
    """Whether some last ones of ``order`` were never routed, so that it is the order; all [E].

    Sums alone do not tell who was routed to with a weight that rounds to 0 and who was not.
    """
    for count in range(len(order) + 1):
        never = np.zeros(len(order), bool)
        never[order[len(order) - count :]] = True
        if (never & ~maybe_never).any():
            return False
        if np.array_equal(rank_experts(scores[None], ~never[None])[0], order):
            return True
    return False


def _require_each(field: str, what: str, right: Iterable[bool]) -> None:
    """Names the first layer that is not right."""
    wrong = np.flatnonzero(~np.asarray(right, bool))
    if len(wrong):
        raise ValueError(f"{field}: layer {wrong[0]}: {what}")


def _require_permutations(field: str, by_layer: list[list[int]]) -> None:
    for index, ids in enumerate(by_layer):
        if strange := sorted(set(ids) - set(range(len(ids)))):
            raise ValueError(
                f"{field}: layer {index}: found expert {strange[0]}, expected ids from 0 to {len(ids) - 1}"
            )
        if len(set(ids)) < len(ids):
            twice = next(i for i in ids if ids.count(i) > 1)
            raise ValueError(f"{field}: layer {index}: expert {twice} is there twice")


def _require_counts(field: str, found: dict[str, list] | None, counts: list[str], num_layers: int) -> None:
    if found is None or sorted(found) != sorted(counts):
        there = None if found is None else sorted(found)
        raise ValueError(f"{field}: found counts {there}, expected {counts}: from top_k to all experts but one")
    for count, by_layer in found.items():
        if len(by_layer) != num_layers:
            raise ValueError(f"{field}.{count}: found {len(by_layer)} layers, expected {num_layers}")


def _require_ascending(field: str, by_layer: list[list[int]], count: int, num_experts: int) -> None:
    for index, ids in enumerate(by_layer):
        if len(ids) != count or ids != sorted(set(ids)) or ids[-1] >= num_experts:
            raise ValueError(
                f"{field}: layer {index}: expected {count} different ids below {num_experts}, ascending; found {ids}"
            )
