"""One pass of a model over blocks: several keep-sets at once, statistics of every kept token."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import ParameterError
from ..model.checkpoint import Checkpoint
from ..progress import progress_bar
from ..text.packs import Blocks
from . import observers, ranks
from .experts import ExpertTrace
from .grams import Grams, GramTrace
from .journal import Journal
from .placement import Placement
from .traversal import Traversal
from .variants import Variant
from .weights import Weights


@dataclass(frozen=True)
class TokenStatistics:
    """Per kept token, ordered by block and position: nll and entropy float32 [N].

    kl_to_base float32 [N] and same_top1 bool [N] where the pass also scored the whole model, else None.
    """

    nll: np.ndarray
    entropy: np.ndarray
    kl_to_base: np.ndarray | None = None
    same_top1: np.ndarray | None = None


@dataclass(frozen=True)
class Pass:
    """What one pass over blocks gave: one TokenStatistics per keep-set, and how fast."""

    variants: list[TokenStatistics]
    seconds: float
    tokens_per_second: float  # positions that this run took through the model, all keep-sets and ranks together
    peak_device_bytes: int | None
    experts: ExpertTrace | None  # of the recorded positions, where it was asked for
    grams: GramTrace | None  # of the sampled positions, likewise


def score(
    weights: Weights,
    blocks: Blocks,
    *,
    keep_sets: Sequence[np.ndarray | None] = (None,),
    entropy_topk: int = 20,
    record_experts: bool = False,
    gram_tokens: int = 0,
    journal: Journal | None = None,
    progress: bool = True,
) -> Pass:
    """Run every block through the model, once per keep-set, and return the statistics of its kept tokens.

    keep_sets: for each variant None (the whole model) or bool [num_layers, num_experts], false where no token may be
    routed. record_experts: also return what every expert did at ``recorded_positions``; only with a single keep-set.
    gram_tokens: likewise what all experts would have done at that many sampled positions, see ``grams.Grams``. Where
    several ranks run, each takes its share of the micro-batches and all return the whole. journal: as Traversal's.
    Raises ScoringError at a token without finite statistics, where tokens or routed experts do not add up, or where one
    block alone exceeds the memory; ParameterError where the Grams exceed it.
    """
    if (record_experts or gram_tokens) and len(keep_sets) != 1:
        raise ValueError("experts are recorded for one model: pass a single keep-set")
    whole = next((v for v, keep in enumerate(keep_sets) if keep is None), None)
    return score_variants(
        weights,
        blocks,
        [Variant(weights, keep) for keep in keep_sets],
        base=whole if len(keep_sets) > 1 else None,
        entropy_topk=entropy_topk,
        record_experts=record_experts,
        gram_tokens=gram_tokens,
        journal=journal,
        progress=progress,
    )


@torch.inference_mode()
def score_variants(
    weights: Weights,
    blocks: Blocks,
    variants: Sequence[Variant],
    *,
    base: int | None,
    entropy_topk: int = 20,
    record_experts: bool = False,
    gram_tokens: int = 0,
    journal: Journal | None = None,
    progress: bool = True,
) -> Pass:
    """As ``score``, of any variants. base: which of them is the whole model, if others are to be compared with it."""
    check_request(weights.checkpoint, [blocks.seq_len], entropy_topk)
    statistics = observers.TokenStatistics(weights, blocks, variants, base, entropy_topk)
    experts = observers.Experts(weights, blocks) if record_experts else None
    grams = Grams(weights, blocks, gram_tokens) if gram_tokens else None
    run = Traversal(weights, blocks, variants, [x for x in (statistics, experts, grams) if x], journal)
    if weights.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(weights.device)
    started = time.perf_counter()
    with progress_bar(run.share(), _name(blocks, variants), "tok", progress and ranks.current()[0] == 0) as advance:
        for tokens in run.forward():
            advance(tokens / weights.checkpoint.num_layers)
    traces = [observer and observer.trace for observer in (experts, grams)]
    noted = [statistics.values, statistics.scored]
    ranks.add_up([*noted, *(tensor for trace in traces if trace for tensor in trace.tensors)])
    statistics.require_complete()
    if experts:
        experts.require_consistent()
    seconds = ranks.largest(time.perf_counter() - started)
    rate = ranks.total(run.share()) / seconds
    peak = torch.cuda.max_memory_allocated(weights.device) if weights.device.type == "cuda" else None
    return Pass([_token_statistics(v) for v in statistics.values], seconds, rate, peak, *traces)


def check_request(checkpoint: Checkpoint, seq_lens: Iterable[int], entropy_topk: int) -> None:
    """Raises ParameterError for a sequence length or K that the model does not have."""
    longest, vocabulary = checkpoint.config.max_position_embeddings, checkpoint.config.vocab_size
    for length in seq_lens:
        if not 2 <= length <= longest:
            raise ParameterError(f"seq_lens: found {length}, expected 2 to {longest}, the model's longest context")
    if not 2 <= entropy_topk <= vocabulary:
        raise ParameterError(f"entropy_topk: found {entropy_topk}, expected 2 to {vocabulary}, the vocabulary")


def gpu_names(placement: Placement) -> str | None:
    """Of all ranks, each kind once; None on a CPU."""
    if placement.device.type == "cpu":
        return None
    return ", ".join(sorted(set(ranks.gather(torch.cuda.get_device_name(placement.device)))))


def _name(blocks: Blocks, variants: Sequence[Variant]) -> str:
    return f"{blocks.pack} {blocks.seq_len}" + (f" x {len(variants)} models" if len(variants) > 1 else "")


def _token_statistics(rows: torch.Tensor) -> TokenStatistics:
    nll, entropy, *compared = rows.numpy()
    return TokenStatistics(nll, entropy, compared[0], compared[1] > 0) if compared else TokenStatistics(nll, entropy)
