"""What makes two results the same evaluation: one list of facts, and which questions each of them decides."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Flag, auto


class Question(Flag):
    """What two results are held against each other for."""

    COMPARABLE = auto()  # may a candidate be judged by a baseline, on one pack and length? (of two models, of course)
    MERGEABLE = auto()  # are two files parts of one result, at different packs or lengths?
    RESUMABLE = auto()  # may a run go on from what an earlier one left?
    SAME_MODEL = auto()  # does a label still mean the model that it meant?


_C, _M, _R, _S = Question
# Where a result records the fact -> what it decides. `seq_lens` and `tokens_sha256` say how far a result has come, and
# `tok_s_pred` how fast: they decide nothing.
FACTS = {
    "meta.model_sha256": _M | _R | _S,
    "meta.keep_set": _M | _R | _S,
    "meta.recovered": _M | _R | _S,
    "meta.dtype": _M | _R,
    "meta.tokenizer_sha256": _C | _M | _R,
    "meta.eos_token_id": _C | _M | _R,
    "meta.rows": _C | _M | _R,
    "meta.num_blocks": _C | _M | _R,
    "meta.entropy_topk": _C | _M | _R,
    "meta.cc_quantile": _C | _M | _R,
    "meta.label": _R,
    "meta.model_id": _R,
    "meta.num_experts": _R,
    "meta.top_k": _R,
    "meta.bytes_total": _R,
    "meta.dataset_repo": _R,
    "meta.pack_files": _R,
    "meta.scored_with": _R,
    "meta.engine": _R,
    "meta.code_sha256": _R,
    "meta.device": _R,
    "meta.gpu_name": _R,
    "meta.torch": _R,
    "meta.transformers_version": _R,
    "meta.python": _R,
    "entry.pack": _C | _R,
    "entry.seq_len": _C | _R,
    "entry.rows_seen": _C | _R,
    "entry.rows_sha256": _C | _R,
    "entry.input_sha256": _C | _R,
    "entry.model.kept_tokens": _C,
    "entry.model.hist2d_x_H.xbins": _C,
    "entry.model.hist2d_x_H.ybins": _C,
}


@dataclass(frozen=True)
class Difference:
    """A fact that two results do not share; None where one does not record it."""

    name: str
    found: object
    expected: object

    def __str__(self) -> str:
        return f"{self.name} is {self.found} against {self.expected}"


@dataclass(frozen=True)
class Identity:
    """The facts of one result, by where they are recorded (the keys of FACTS)."""

    facts: Mapping[str, object]

    @classmethod
    def of(cls, meta: Mapping | None = None, entry: Mapping | None = None) -> "Identity":
        """Facts of a whole result, of one of its entries (with its ``pack`` and ``seq_len``), or of both."""
        recorded = {"meta": meta, "entry": entry}
        return cls({place: _at(recorded, place) for place in FACTS})

    @property
    def resumable(self) -> dict[str, object]:
        """The facts that must be equal for a run to go on from what an earlier one left."""
        return {place: self.facts[place] for place, decides in FACTS.items() if Question.RESUMABLE in decides}

    def differences(self, expected: "Identity", question: Question) -> list[Difference]:
        """Facts that decide ``question`` and differ.

        Earlier files record less. For COMPARABLE a fact that one side lacks is passed over; for all other questions it
        differs from one that is there.
        """
        found = []
        for place, decides in FACTS.items():
            mine, other = self.facts[place], expected.facts[place]
            unknown = question is Question.COMPARABLE and (mine is None or other is None)
            if question in decides and mine != other and not unknown:
                found.append(Difference(place.rpartition(".")[2], mine, other))
        return found


def _at(recorded: object, place: str) -> object:
    """The value at a dotted place, or None."""
    for name in place.split("."):
        recorded = recorded.get(name) if isinstance(recorded, Mapping) else None
    return recorded
