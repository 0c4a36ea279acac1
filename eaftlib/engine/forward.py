"""One pass of a model over blocks: layer by layer, several keep-sets at once, statistics of every kept token."""

import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import ParameterError, ScoringError
from ..kernels import token_statistics as kernel
from ..model.checkpoint import Checkpoint
from ..text.packs import Blocks
from . import ranks
from .experts import ExpertProbe, ExpertTrace
from .hidden_states import InHostMemory, OnDevice
from .placement import free_bytes
from .weights import Weights

MICRO_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
DEVICE_SHARE = 0.25  # of free GPU memory that waiting hidden states may take
HOST_SHARE = 0.4  # of free host memory, likewise; pinned memory comes in powers of two, so it may take twice that


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
    tokens_per_second: float  # positions run through the model, all keep-sets and ranks together, per second
    peak_device_bytes: int | None
    experts: ExpertTrace | None  # of the recorded positions, where it was asked for


def score(
    weights: Weights,
    blocks: Blocks,
    *,
    keep_sets: Sequence[np.ndarray | None] = (None,),
    entropy_topk: int = 20,
    record_experts: bool = False,
    progress: bool = True,
) -> Pass:
    """Run every block through the model, once per keep-set, and return the statistics of its kept tokens.

    keep_sets: for each variant None (the whole model) or bool [num_layers, num_experts], false where an expert's
    router logit becomes minus infinity. record_experts: also return what every expert did at ``recorded_positions``; only
    with a single keep-set. Where several ranks run, each takes its share of the micro-batches and all return the whole. Raises
    ScoringError at a token without finite statistics, or where one block alone exceeds the memory.
    """
    check_request(weights.checkpoint, [blocks.seq_len], entropy_topk)
    if record_experts and len(keep_sets) != 1:
        raise ValueError("experts are recorded for one model: pass a single keep-set")
    with torch.inference_mode():
        return _Run(weights, blocks, keep_sets, entropy_topk, record_experts).run(progress)


def check_request(checkpoint: Checkpoint, seq_lens: Iterable[int], entropy_topk: int) -> None:
    """Raises ParameterError for a sequence length or K that the model does not have."""
    longest, vocabulary = checkpoint.config.max_position_embeddings, checkpoint.config.vocab_size
    for length in seq_lens:
        if not 2 <= length <= longest:
            raise ParameterError(f"seq_lens: found {length}, expected 2 to {longest}, the model's longest context")
    if not 2 <= entropy_topk <= vocabulary:
        raise ParameterError(f"entropy_topk: found {entropy_topk}, expected 2 to {vocabulary}, the vocabulary")


def recorded_positions(blocks: Blocks) -> np.ndarray:
    """bool [num_blocks, seq_len]: where a kept token stands or is predicted, the positions where experts are recorded."""
    mask = blocks.kept.copy()
    mask[:, :-1] |= blocks.kept[:, 1:]
    return mask


class _Run:
    """State of one pass. A wave of blocks goes through all layers before the next wave starts, micro-batch by micro-batch.

    Where all decoded layers stay on the device, a wave is one micro-batch. Otherwise a wave is all blocks whose hidden
    states can wait, on the device or in host memory: each layer is read once per wave.
    """

    def __init__(self, weights, blocks, keep_sets, entropy_topk, record_experts):
        self.weights, self.blocks, self.keep_sets, self.entropy_topk = weights, blocks, keep_sets, entropy_topk
        self.device, self.dtype = weights.device, weights.dtype
        self.tokens = torch.from_numpy(blocks.tokens).long()
        self.kept = torch.from_numpy(blocks.kept)
        self.kept_before = _before(self.kept)
        # Blocks at once, and tokens with logits at once; both are halved when memory is short.
        self.batch = min(max(1, MICRO_BATCH_TOKENS[self.device.type] // blocks.seq_len), len(self.tokens))
        layers = weights.checkpoint.num_layers
        self.biases = [[weights.router_bias(layer, keep) for keep in keep_sets] for layer in range(layers)]
        self.base = next((v for v, keep in enumerate(keep_sets) if keep is None), None)
        self.compare = self.base is not None and len(keep_sets) > 1
        self.slice = kernel.slice_rows(weights.lm_head.shape[0], self.device)
        # Rows of nll, entropy and, where the whole model is among the variants, KL and same arg-max.
        self.statistics = torch.zeros(len(keep_sets), 4 if self.compare else 2, int(self.kept.sum()))
        self.experts = None
        if record_experts:
            self.recorded = torch.from_numpy(recorded_positions(blocks))
            self.recorded_before = _before(self.recorded)
            rows = int(self.recorded.sum())
            self.experts = ExpertTrace.empty(layers, rows, weights.checkpoint.top_k, self.device)

    def run(self, progress: bool) -> Pass:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        started = time.perf_counter()
        waves = self._waves()
        total = sum(map(len, waves)) * self.blocks.seq_len * len(self.keep_sets)
        with _progress_bar(total, self._name(), progress and ranks.current()[0] == 0) as advance:
            for wave in waves:
                self._through_layers(wave, advance)
        ranks.add_up([self.statistics, *(self.experts.tensors if self.experts else ())])
        seconds = ranks.largest(time.perf_counter() - started)
        rate = self.tokens.numel() * len(self.keep_sets) / seconds
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        return Pass([_token_statistics(rows) for rows in self.statistics], seconds, rate, peak, self.experts)

    def _name(self) -> str:
        variants = f" x {len(self.keep_sets)} models" if len(self.keep_sets) > 1 else ""
        return f"{self.blocks.pack} {self.blocks.seq_len}{variants}"

    def _waves(self) -> list[torch.Tensor]:
        """Ids of the blocks of each wave, in order. A rank takes a run of micro-batches, each composed as it would be alone."""
        rank, size = ranks.current()
        batches = torch.arange(len(self.tokens)).split(self.batch)
        first, last = (
            -(-r * len(batches) // size) for r in (rank, rank + 1)
        )  # rounded up: rank 0 has the largest share
        batches = batches[first:last]
        if self.weights.resident or not batches:
            return list(batches)
        room = HOST_SHARE * free_bytes(torch.device("cpu")) / ranks.on_this_host()
        per_wave = max(1, int(room // self._state_bytes(len(batches[0]))))
        return [torch.cat(batches[i : i + per_wave]) for i in range(0, len(batches), per_wave)]

    def _state_bytes(self, num_blocks: int) -> int:
        width = self.weights.embedding.shape[1]
        return num_blocks * self.blocks.seq_len * width * self.dtype.itemsize * len(self.keep_sets)

    def _embed(self, wave: torch.Tensor) -> OnDevice | InHostMemory:
        weights, variants = self.weights, len(self.keep_sets)
        ids = self.tokens[wave].to(weights.embedding.device)
        room = DEVICE_SHARE * free_bytes(self.device, weights.placement.max_bytes)
        if weights.resident or self.device.type == "cpu" or self._state_bytes(len(wave)) <= room:
            embedded = weights.embedding[ids].to(self.device)
            return OnDevice([embedded, *(embedded.clone() for _ in range(variants - 1))])
        shape = (*ids.shape, weights.embedding.shape[1])
        values = [torch.empty(shape, dtype=self.dtype, pin_memory=True) for _ in range(variants)]
        for value in values:
            torch.index_select(weights.embedding, 0, ids.flatten(), out=value.view(-1, shape[-1]))
        return InHostMemory(values, self.device)

    def _through_layers(self, wave: torch.Tensor, advance) -> None:
        states = self._embed(wave)
        positions = torch.arange(self.blocks.seq_len, device=self.device)[None]
        rotary = self.weights.rotary(torch.empty(0, dtype=self.dtype, device=self.device), positions)
        for index, layer in self.weights.layers():
            for variant, bias in enumerate(self.biases[index]):
                layer.mlp.router.bias.data = bias

                def through_layer(rows: slice, index=index, layer=layer, variant=variant) -> None:
                    hidden = states.fetch(variant, rows)
                    self._announce_next(states, variant, rows, len(wave))
                    layer.mlp.experts.probe = self.experts and self._probe(index, wave[rows])
                    hidden = layer(hidden, position_ids=positions, position_embeddings=rotary)
                    states.store(variant, rows, hidden)

                for rows in self._micro_batches(len(wave), through_layer):
                    advance((rows.stop - rows.start) * self.blocks.seq_len / len(self.biases))
                del through_layer
            layer.mlp.experts.probe = None
            del layer

        def collect(rows: slice) -> None:
            hidden = [self.weights.norm(states.fetch(v, rows)) for v in range(len(self.keep_sets))]
            self._collect(wave[rows], hidden)

        for _ in self._micro_batches(len(wave), collect):
            pass

    def _announce_next(self, states: OnDevice | InHostMemory, variant: int, rows: slice, count: int) -> None:
        """Have the next hidden states brought to the device while these are computed."""
        if rows.stop < count:
            states.prefetch(variant, slice(rows.stop, min(rows.stop + self.batch, count)))
        elif variant + 1 < len(self.keep_sets):
            states.prefetch(variant + 1, slice(0, min(self.batch, count)))

    def _micro_batches(self, count: int, work) -> Iterator[slice]:
        """Do ``work(rows)`` for all rows of a wave; where memory runs out, again with half as many, and so from then on."""
        start = 0
        while start < count:
            rows = slice(start, min(start + self.batch, count))
            try:
                work(rows)
            except torch.OutOfMemoryError as error:
                self._retreat(error)
                continue
            yield rows
            start = rows.stop

    def _retreat(self, error: torch.OutOfMemoryError) -> None:
        if self.batch == 1:
            raise ScoringError(
                f"{self.device} has too little memory for one block of {self.blocks.seq_len} tokens: {error}. Use shorter "
                "sequences, raise max_gpu_memory, or free the memory other programs hold."
            ) from error
        self.batch //= 2
        self.slice = max(1, self.slice // 2)
        torch.cuda.empty_cache()
        warnings.warn(
            f"{self.device} ran out of memory: going on with {self.batch} blocks of {self.blocks.seq_len} at once",
            stacklevel=2,
        )

    def _probe(self, layer: int, batch: torch.Tensor) -> ExpertProbe:
        rows = self.recorded[batch].flatten().nonzero().squeeze(1).to(self.device)
        return ExpertProbe(self.experts, layer, int(self.recorded_before[batch[0]]), rows)

    def _collect(self, batch: torch.Tensor, hidden: list[torch.Tensor]) -> None:
        """Statistics of a micro-batch's kept tokens, a slice of tokens at a time."""
        kept = self.kept[batch].flatten().nonzero().squeeze(1)
        targets = self.tokens[batch].flatten()[kept].to(self.device)
        predictors = (kept - 1).to(self.device)  # position 0 is never kept: the token before is of the same block
        hidden = [h.flatten(0, 1)[predictors] for h in hidden]
        collected: list[list[torch.Tensor]] = [[] for _ in hidden]
        order = sorted(range(len(hidden)), key=lambda v: v != self.base)  # the base first
        for start in range(0, len(targets), self.slice):
            part = slice(start, start + self.slice)
            reference = None
            for v in order:
                logits = kernel.logits_of(hidden[v][part], self.weights.lm_head)
                rows = kernel.token_statistics(logits, targets[part], self.entropy_topk)
                if self.compare:
                    reference = reference or kernel.Reference(logits)
                    rows += reference.compare(logits)
                collected[v].append(torch.stack([row.float() for row in rows]))
        first = int(self.kept_before[batch[0]])
        for v, parts in enumerate(collected):
            if parts:
                values = torch.cat(parts, dim=1).cpu()
                self.statistics[v, :, first : first + len(kept)] = values
                self._require_finite(values, first)

    def _require_finite(self, values: torch.Tensor, first: int) -> None:
        bad = ~torch.isfinite(values[:2]).all(0)
        if bad.any():
            at = int(bad.nonzero()[0])
            block, position = self.kept.nonzero()[first + at].tolist()
            nll, entropy = values[:2, at].tolist()
            raise ScoringError(
                f"block {block}, position {position}: nll {nll}, entropy {entropy}; expected finite values "
                f"({int(bad.sum())} bad tokens in this micro-batch). The weights hold NaN or Inf, or {self.dtype} overflowed: "
                "verify the checkpoint, or run with dtype float32."
            )


def _before(mask: torch.Tensor) -> torch.Tensor:
    """int64 [num_blocks]: how many positions of ``mask`` lie in earlier blocks."""
    counts = mask.sum(1)
    return counts.cumsum(0) - counts


def _token_statistics(rows: torch.Tensor) -> TokenStatistics:
    nll, entropy, *compared = rows.numpy()
    return TokenStatistics(nll, entropy, compared[0], compared[1] > 0) if compared else TokenStatistics(nll, entropy)


@contextmanager
def _progress_bar(total: int, name: str, shown: bool):
    from tqdm import tqdm

    with tqdm(total=total, desc=name, unit="tok", unit_scale=True, disable=not shown, mininterval=0.5) as bar:
        # Shares of layers add up past the total by rounding.
        yield lambda tokens: bar.update(min(tokens, total - bar.n))
