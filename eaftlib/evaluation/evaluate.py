"""Evaluate a model, or many keep-sets of it in one pass, on packs and sequence lengths."""

import platform
import re
import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers

from .. import __version__, project
from ..engine import forward, ranks
from ..engine.journal import FOLDER, Journal
from ..engine.launch import over_gpus
from ..engine.placement import Placement
from ..engine.selftest import LONG_TOKENS, selftest
from ..engine.traversal import micro_batches
from ..engine.weights import Weights
from ..errors import ParameterError, ResultError
from ..files import FILE_NAME, require_writable_folder
from ..model.checkpoint import Checkpoint
from ..pruning.keepsets import KeepSet
from ..pruning.slicing import checkpoint_sizes, read_manifest
from ..text.packs import Blocks, PackSource, pack_blocks
from . import results
from .identity import Identity, Question
from .statistics import Tokens, aggregate


def _shares(placement: Placement, seq_lens: Sequence[int], num_blocks: int | Mapping[str, int], **_) -> int:
    return max((micro_batches(results.blocks_at(num_blocks, n), n, placement.device) for n in seq_lens), default=1)


@over_gpus(_shares)
def evaluate(
    checkpoint: Checkpoint,
    source: PackSource,
    placement: Placement,
    keep_sets: Mapping[str, KeepSet | None],
    *,
    seq_lens: Sequence[int],
    num_blocks: int | Mapping[str, int],
    only: Sequence[str] | None = None,
    rows: str = "all",
    entropy_topk: int = 20,
    cc_quantile: float = 0.15,
    out_dir: str | Path,
    progress: bool = True,
) -> list[Path]:
    """Score every keep-set (label -> KeepSet, or None for the whole model) and write one result per label.

    num_blocks: of each sequence length, or by length, as text. Every pack and sequence length is one pass over the weights that
    serves all keep-sets. What an earlier run of the very same has finished is not repeated: passes, and of the pass that it
    was killed in, all but about a minute. Returns the JSON paths.
    """
    out_dir = Path(out_dir)
    _require_file_names(keep_sets)
    require_writable_folder(out_dir, ParameterError)
    forward.check_request(checkpoint, seq_lens, entropy_topk)
    packs = list(only) if only is not None else source.names
    # Packing comes first: a pack that is missing or too short is found before any weight is read.
    jobs = _packed(checkpoint, source, packs, {n: results.blocks_at(num_blocks, n) for n in seq_lens}, rows)
    settings = {"num_blocks": num_blocks, "entropy_topk": entropy_topk, "cc_quantile": cc_quantile}
    settings |= {"rows": rows, "seq_lens": list(seq_lens), "scored_with": list(keep_sets)}
    settings |= {"gpu_name": forward.gpu_names(placement)}
    metas = {label: _meta(checkpoint, source, placement, label, keep) | settings for label, keep in keep_sets.items()}
    _require_same_models(out_dir, metas)
    masks = [keep and keep.mask for keep in keep_sets.values()]
    finished = {label: _finished(out_dir / f"{label}.json", meta) for label, meta in metas.items()}
    entries, tokens = ({label: pair[i] for label, pair in finished.items()} for i in (0, 1))
    for label, meta in metas.items():
        meta["seq_lens"] = list(dict.fromkeys([*(length for _, length in entries[label]), *seq_lens]))
    left = _left(jobs, entries, progress)
    _join(out_dir, metas, entries, tokens)
    weights = Weights(checkpoint, placement) if left else None
    if sum(blocks.tokens.size for blocks in left.values()) * len(keep_sets) >= LONG_TOKENS:
        selftest(weights, next(iter(left.values())), progress)
    for key, blocks in left.items():
        journal = Journal(out_dir / FOLDER, _identity(metas, blocks))
        run = forward.score(
            weights, blocks, keep_sets=masks, entropy_topk=entropy_topk, journal=journal, progress=progress
        )
        _set_aside([out_dir / f"{label}.json" for label in keep_sets if not entries[label]])
        block, position = (x.astype(np.int32) for x in np.nonzero(blocks.kept))
        for label, variant in zip(keep_sets, run.variants, strict=True):
            tokens[label][key] = Tokens(block, position, variant.nll, variant.entropy, blocks.row[blocks.kept])
            entries[label][key] = _entry(blocks, tokens[label][key], variant, run, cc_quantile)
            # Written after every pass: what is done survives a crash in the next one.
            results.write(out_dir, label, metas[label], entries[label], tokens[label])
        journal.remove()
    return [out_dir / f"{label}.json" for label in keep_sets]


def _packed(
    checkpoint: Checkpoint, source: PackSource, packs: Sequence[str], blocks_of: Mapping[int, int], rows: str
) -> list[Blocks]:
    """Every pack at every sequence length; blocks_of: how many blocks of each."""
    spans = checkpoint.family.completion_spans
    return [
        pack_blocks(source, pack, checkpoint.tokenizer, spans, seq_len=length, num_blocks=count, rows=rows)
        for pack in packs
        for length, count in blocks_of.items()
    ]


def _finished(path: Path, meta: dict) -> tuple[dict, dict]:
    """Entries and tokens that an earlier run wrote to ``path`` with the same code, model, settings and device.

    The process may have ended between the writing of the two files: an entry counts if its tokens give its numbers.
    """
    entries: dict[tuple[str, int], dict] = {}
    tokens: dict[tuple[str, int], Tokens] = {}
    if not path.is_file() or not results.tokens_path(path).is_file():
        return entries, tokens
    old = results.read(path)
    if Identity.of(old.meta).differences(Identity.of(meta), Question.RESUMABLE):
        return entries, tokens
    stored = results.read_tokens(results.tokens_path(path), meta["num_blocks"])
    for key, entry in old.entries.items():
        expected = key in stored and aggregate(
            stored[key], results.blocks_at(meta["num_blocks"], key[1]), meta["cc_quantile"]
        )
        if expected and stored[key].row is not None and expected.items() <= entry["model"].items():
            entries[key], tokens[key] = entry, stored[key]
    return entries, tokens


def _join(out_dir: Path, metas: Mapping[str, dict], entries: dict[str, dict], tokens: dict[str, dict]) -> None:
    """Write again what a run left that was killed between its two files: it is gone on from, but nobody else would read it."""
    for label, found in entries.items():
        if found and not results.belong_together(out_dir / f"{label}.json"):
            results.write(out_dir, label, metas[label], found, tokens[label])


def _identity(metas: Mapping[str, dict], blocks: Blocks) -> dict[str, dict]:
    """All that the numbers of one pass depend on, by label."""
    entry = _inputs(blocks) | {"pack": blocks.pack, "seq_len": blocks.seq_len}
    return {label: Identity.of(meta, entry).resumable for label, meta in metas.items()}


def _left(jobs: Sequence[Blocks], entries: dict[str, dict], progress: bool) -> dict[tuple[str, int], Blocks]:
    """Passes that an earlier run has not finished."""
    left = {(b.pack, b.seq_len): b for b in jobs if _is_left(b, entries.values())}
    there = [f"{b.pack} {b.seq_len}" for b in jobs if (b.pack, b.seq_len) not in left]
    if there and progress and ranks.current()[0] == 0:
        print(f"finished by an earlier run of the same, not repeated: {', '.join(there)}")
    return left


def _is_left(blocks: Blocks, finished: Collection[dict]) -> bool:
    """Whether a pass has to be made: on some rank, some model lacks it, or has it of other rows or tokens."""
    key, wanted = (blocks.pack, blocks.seq_len), Identity.of(entry=_inputs(blocks))
    there = [Identity.of(entry=entries[key]) for entries in finished if key in entries]
    same = [found for found in there if not found.differences(wanted, Question.RESUMABLE)]
    return bool(ranks.largest(float(len(same) < len(finished))))


def _set_aside(paths: list[Path]) -> None:
    """Keep what a run with other settings has left under these labels, until the next one does the same.

    Tokens without a JSON are none: a run was killed before it had a result. The JSON goes last, so that after a kill in
    between the next run still finds it, and joins it with its tokens.
    """
    if ranks.is_first_on_host():
        for path in (path for path in paths if path.is_file()):
            for old in (file for file in (results.tokens_path(path), path) if file.is_file()):
                old.replace(old.with_name(f"{old.name}.old"))
    ranks.largest(0.0)  # the other ranks write only after that


def _entry(
    blocks: Blocks, tokens: Tokens, variant: forward.TokenStatistics, run: forward.Pass, cc_quantile: float
) -> dict:
    model = aggregate(tokens, len(blocks.tokens), cc_quantile) | {"tok_s_pred": run.tokens_per_second}
    if variant.kl_to_base is not None:
        model["kl_to_base"] = float(variant.kl_to_base.mean(dtype=np.float64))
        model["top1_agreement"] = float(variant.same_top1.mean())
    return _inputs(blocks) | {"model": model}


def _inputs(blocks: Blocks) -> dict:
    """What an entry says of the tokens that it was made from."""
    return {
        "rows_seen": blocks.rows_seen,
        "rows_sha256": blocks.rows_sha256,
        "input_sha256": blocks.input_sha256,
    }


def _require_file_names(labels: Iterable[str]) -> None:
    for label in labels:
        if not re.fullmatch(FILE_NAME, label):
            raise ParameterError(
                f"label: found {reprlib.repr(label)}; it names files: expected a letter or digit, and then up to 99 letters, "
                "digits, '_', '.', '+' or '-'"
            )


def _require_same_models(out_dir: Path, metas: dict[str, dict]) -> None:
    """A label must not replace another model's result.

    Which model an earlier version's result is of cannot be told: its ``model_sha256`` covers the routers alone, and it
    records no EOS token. No run goes on from it; it is set aside.
    """
    for label, meta in metas.items():
        path = out_dir / f"{label}.json"
        old = results.read(path).meta if path.is_file() else meta
        different = Identity.of(old).differences(Identity.of(meta), Question.SAME_MODEL)
        if different and "eos_token_id" in old:
            raise ResultError(
                f"{path} is the result of another model: {'; '.join(map(str, different))}. Choose another label or "
                "out_dir, or remove it."
            )


def _meta(
    checkpoint: Checkpoint,
    source: PackSource,
    placement: Placement,
    label: str,
    keep: KeepSet | None,
) -> dict:
    manifest = read_manifest(checkpoint)
    return {
        "label": label,
        "model_id": checkpoint.model_id,
        "model_sha256": checkpoint.sha256,
        "tokenizer_sha256": checkpoint.tokenizer_sha256,
        "eos_token_id": checkpoint.tokenizer.eos_token_id,
        "num_experts": checkpoint.num_experts,
        "top_k": checkpoint.top_k,
        "bytes_total": checkpoint_sizes(checkpoint, keep and keep.keep_n).total,
        "keep_set": keep.chosen_by if keep else manifest.get("chosen_by"),
        "recovered": manifest.get("recovered"),
        "dataset_repo": source.source,
        "pack_files": source.pack_files,
        "engine": f"eaftlib {__version__}",
        "code_sha256": project.code_sha256(),
        "device": placement.device.type,
        "dtype": placement.precision.name,
        "torch": torch.__version__,
        "transformers_version": transformers.__version__,
        "python": platform.python_version(),
    }
