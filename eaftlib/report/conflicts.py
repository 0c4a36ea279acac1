"""The worst new confident conflicts of candidates, with their text: where a model has become sure and wrong.

Results hold no text. The same blocks are cut again from the packs that the baseline's file names.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import ResultError
from ..evaluation.gates import Gates
from ..evaluation.results import Result
from ..evaluation.statistics import Tokens, conflicts
from ..text.packs import Blocks

WORST = 10  # of each candidate
CONTEXT = 40  # tokens before the one that is shown; a quarter of them after it


@dataclass(frozen=True)
class Conflict:
    """A token that is a conflict of the candidate and not of the baseline, both under the baseline's thresholds.

    p: probability of the token, by the baseline and by the candidate; entropy: the candidate's, in [0, 1].
    """

    block: int
    position: int
    before: str
    token: str
    after: str
    p_base: float
    p: float
    entropy: float


@dataclass(frozen=True)
class ConflictTexts:
    """Of one candidate: how many new conflicts it has on a pack and length, and the worst, largest increase of nll first."""

    label: str
    pack: str
    seq_len: int
    new: int
    worst: tuple[Conflict, ...]


def worst_conflicts(results: list[Result], baseline: str, gates: Gates) -> tuple[ConflictTexts, ...]:
    """Of every candidate with per-token values, on the primary pack at its longest length.

    Raises ResultError where the baseline has no per-token values there, or where packs or tokenizer are no longer what it was
    scored on.
    """
    base = next((r for r in results if r.label == baseline), None)
    if base is None:
        raise ResultError(f"baseline: no result is labelled {baseline!r}; there are {[r.label for r in results]}")
    lengths = [n for pack, n in base.entries if pack == gates.primary_pack]
    if not lengths:
        raise ResultError(
            f"conflict_texts: {base.path} has no pack {gates.primary_pack}; it has {sorted(base.entries)}"
        )
    key = gates.primary_pack, max(lengths)
    base_tokens = base.tokens(*key)
    if base_tokens is None:
        raise ResultError(
            f"conflict_texts: {base.path} has no .tokens.parquet beside it, which says where its tokens lie; evaluate again"
        )
    blocks, tokenizer = _blocks_again(base, *key)
    thresholds = base.entries[key]["model"]["p_thr"], base.entries[key]["model"]["h_thr"]
    found = []
    for result in results:
        tokens = result.tokens(*key) if result is not base and key in result.entries else None
        if tokens is not None:
            new = _new_conflicts(tokens, base_tokens, *thresholds)
            worst = tuple(_conflict(i, tokens, base_tokens, blocks, tokenizer) for i in new[:WORST])
            found.append(ConflictTexts(result.label, *key, len(new), worst))
    return tuple(found)


def _new_conflicts(tokens: Tokens, base: Tokens, p_thr: float, h_thr: float) -> np.ndarray:
    """Indices of kept tokens, the largest increase of nll first."""
    now, before = (conflicts(t.probability, t.entropy.astype(np.float64), p_thr, h_thr) for t in (tokens, base))
    new = np.flatnonzero(now & ~before)
    return new[np.argsort(base.nll[new] - tokens.nll[new], kind="stable")]


def _blocks_again(base: Result, pack: str, seq_len: int) -> tuple[Blocks, object]:
    """The blocks that the baseline was scored on, and its tokenizer."""
    from ..model.checkpoint import Checkpoint
    from ..text.packs import PackSource, pack_blocks

    meta = next((part.meta for part in base.parts if (pack, seq_len) in part.entries), base.meta)
    checkpoint = Checkpoint(meta["model_id"])
    num_blocks = meta["num_blocks"]
    blocks = pack_blocks(
        PackSource(meta["dataset_repo"], meta["pack_files"]),
        pack,
        checkpoint.tokenizer,
        checkpoint.family.completion_spans,
        seq_len=seq_len,
        num_blocks=num_blocks[str(seq_len)] if isinstance(num_blocks, Mapping) else num_blocks,
        rows=meta["rows"],
    )
    _require_same(blocks, base, meta)
    return blocks, checkpoint.tokenizer


def _require_same(blocks: Blocks, base: Result, meta: Mapping) -> None:
    entry = base.entries[blocks.pack, blocks.seq_len]
    for name, now in (("rows_sha256", blocks.rows_sha256), ("input_sha256", blocks.input_sha256)):
        if entry.get(name) not in (None, now):
            raise ResultError(
                f"conflict_texts: {blocks.pack} of {meta['dataset_repo']} is not what {base.path} was scored on: {name} is "
                f"{now}, expected {entry[name]}. Put the packs and the tokenizer of that evaluation back, or evaluate again."
            )


def _conflict(index: int, tokens: Tokens, base: Tokens, blocks: Blocks, tokenizer) -> Conflict:
    block, position = int(tokens.block[index]), int(tokens.position[index])
    ids = blocks.tokens[block]
    return Conflict(
        block=block,
        position=position,
        before=tokenizer.decode(ids[max(0, position - CONTEXT) : position]),
        token=tokenizer.decode(ids[position : position + 1]),
        after=tokenizer.decode(ids[position + 1 : position + 1 + CONTEXT // 4]),
        p_base=float(base.probability[index]),
        p=float(tokens.probability[index]),
        entropy=float(tokens.entropy[index]),
    )
