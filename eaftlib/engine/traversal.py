"""Blocks through the layers of a model and back: resident or streamed, micro-batch by micro-batch; computes nothing itself."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from ..errors import ScoringError
from ..text.packs import Blocks
from . import ranks
from .hidden_states import InHostMemory, OnDevice
from .journal import Journal, Part
from .observers import Observer, Step
from .placement import free_bytes
from .variants import Variant
from .weights import Weights

MICRO_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
# Likewise on the way back, where what layers computed waits for its gradient; 4,096 tokens of gpt-oss's 2,880.
TRAINING_VALUES = {"cpu": 1 << 19, "cuda": 4096 * 2880}  # of hidden states at once
DEVICE_SHARE = 0.25  # of free GPU memory that waiting hidden states may take
WAVE_TOKENS = 1 << 19  # of all variants in a wave that a journal waits for: 5 minutes of a T4, 10 seconds of an H100
HOST_SHARE = 0.4  # of free host memory, likewise; pinned memory comes in powers of two, so it may take twice that

States = OnDevice | InHostMemory
Loss = Callable[[torch.Tensor, list[torch.Tensor]], torch.Tensor]


def micro_batches(num_blocks: int, seq_len: int, device: torch.device, hidden_size: int | None = None) -> int:
    """How many there are of so many blocks, where memory suffices; hidden_size: the model's, in training."""
    return -(-num_blocks // _blocks_at_once(seq_len, device, hidden_size))


def _blocks_at_once(seq_len: int, device: torch.device, hidden_size: int | None, most: int | None = None) -> int:
    """most: tokens, where memory has run out before."""
    at_once = MICRO_BATCH_TOKENS[device.type] if hidden_size is None else TRAINING_VALUES[device.type] // hidden_size
    return max(1, min(at_once, most or at_once) // seq_len)


class Traversal:
    """One way of blocks through a model's variants. A wave of blocks passes all layers before the next wave starts.

    Where all decoded layers stay on the device, a wave is one micro-batch. Otherwise it is all blocks whose hidden
    states can wait, on the device or in host memory: each layer is read once per wave. Where several ranks run, each takes
    its share of the micro-batches, composed as they would be alone. Where memory runs out, a micro-batch is halved, with
    a warning (in training, what layers computed is let go first); ScoringError where one block alone is too much.
    """

    def __init__(
        self,
        weights: Weights,
        blocks: Blocks,
        variants: Sequence[Variant],
        observers: Sequence[Observer] = (),
        journal: Journal | None = None,
    ):
        """journal: what an earlier run has noted there is not computed again; what this one finishes is kept there."""
        self.weights, self.variants, self.observers, self.journal = weights, variants, observers, journal
        self.tokens = torch.from_numpy(blocks.tokens).long()
        self.device, self.seq_len = weights.device, blocks.seq_len
        width = weights.checkpoint.config.hidden_size if weights.backend.training else None
        self.batch = min(_blocks_at_once(self.seq_len, self.device, width, weights.room.tokens), len(self.tokens))
        self.positions = torch.arange(self.seq_len, device=self.device)[None]
        self._batches = self._left() if journal else self._my_batches()

    def share(self) -> int:
        """Tokens of this rank's blocks, all variants together."""
        return sum(map(len, self._batches)) * self.seq_len * len(self.variants)

    def forward(self) -> Iterator[int]:
        """Run this rank's blocks; yields the tokens of each micro-batch, once for every layer and variant."""
        try:
            for wave in self._waves(len(self.variants)):
                yield from self._forward_wave(wave)
                if self.journal:
                    self.journal.add(Part(int(wave[0]), int(wave[-1]) + 1), self.observers)
        except KeyboardInterrupt:  # a person's, or a deadline's
            if self.journal:
                self.journal.flush(self.observers)
            raise

    def backward(self, loss: Loss) -> Iterator[int]:
        """Add the gradients of a loss to ``grad`` of what the last variant trains; yields as ``forward``, on both ways.

        The other variants only run beside it, through the same layers: a teacher, say. loss: (ids of blocks [B], each
        variant's hidden [B, S, H] after the final norm) -> the sum of their losses; called once a micro-batch. Gradients are
        of this rank's blocks. Where layers are streamed, or memory is short, only hidden states between layers are kept
        and each layer's own are computed again on the way back. Raises ValueError for weights that were not opened for
        training.
        """
        if not self.weights.backend.training:
            raise ValueError(
                "the weights were opened for inference, and their functions may have no gradients: open them "
                "with training=True"
            )
        for wave in self._waves(self.weights.checkpoint.num_layers + len(self.variants)):
            yield from self._backward_wave(wave, loss)

    def _forward_wave(self, wave: torch.Tensor) -> Iterator[int]:
        inputs, states = self._layer_inputs(), self._embed(wave, len(self.variants), len(self.variants))
        for index, layer in self.weights.layers():
            for v, variant in enumerate(self.variants):

                def through_layer(rows: slice, index=index, layer=layer, v=v, variant=variant) -> None:
                    step, hidden = Step(index, v, wave[rows]), states.fetch(v, rows)
                    self._announce_next(states, v, rows, len(wave))
                    with ExitStack() as watched:
                        for observer in self.observers:
                            watched.enter_context(observer.around(step, layer))
                        hidden = variant.run(index, layer, hidden, **inputs)
                    states.store(v, rows, hidden)

                yield from self._micro_batches(len(wave), through_layer)
                del through_layer
            del layer

        def collect(rows: slice) -> None:
            hidden = [x.norm(states.fetch(v, rows)) for v, x in enumerate(self.variants)]
            for observer in self.observers:
                observer.collect(wave[rows], hidden)

        for _ in self._micro_batches(len(wave), collect):
            pass

    def _backward_wave(self, wave: torch.Tensor, loss: Loss) -> Iterator[int]:
        *beside, variant = self.variants
        ends = (self.weights.family.final_norm, self.weights.family.lm_head)
        inputs, at_once = self._layer_inputs(), self.weights.checkpoint.num_layers + len(self.variants)
        others, waiting = self._embed(wave, len(beside), at_once), [self._embed(wave, 1, at_once)]
        graphs: dict[int, Graph] = {}  # of layers, where the wave is one micro-batch and there is room

        def keeps_graphs(rows: slice) -> bool:
            if not self.weights.room.for_graphs or rows != slice(0, len(wave)):
                graphs.clear()
                return False
            return True

        for index, layer in self.weights.layers():
            waiting.append(waiting[-1].empty_like())

            def through_layer(rows: slice, index=index, layer=layer) -> None:
                keep = keeps_graphs(rows)
                with torch.no_grad():
                    taught = [
                        other.run(index, layer, others.fetch(v, rows), **inputs) for v, other in enumerate(beside)
                    ]
                hidden = _leaf(waiting[-2].fetch(0, rows))
                with torch.set_grad_enabled(keep):
                    value = variant.run(index, layer, hidden, **inputs)
                waiting[-1].store(0, rows, value.detach())
                for v, made in enumerate(taught):  # last: where memory is short, all of this is done again
                    others.store(v, rows, made)
                if keep:
                    graphs[index] = Graph(hidden, value)

            yield from self._micro_batches(len(wave), through_layer)
            del layer, through_layer
        states = waiting.pop()  # at first what leaves the last layer, then the gradient that arrives at each layer

        def through_loss(rows: slice) -> None:
            keeps_graphs(rows)
            with torch.no_grad():
                teachers = [other.norm(others.fetch(v, rows)) for v, other in enumerate(beside)]
            hidden = _leaf(states.fetch(0, rows))
            with torch.enable_grad():
                value = loss(wave[rows], [*teachers, variant.norm(hidden)])
            states.store(0, rows, _gradients(Graph(hidden, value), None, variant.trained(*ends)))

        for _ in self._micro_batches(len(wave), through_loss):
            pass
        for index, layer in self.weights.layers(backwards=True):
            below = waiting.pop()

            def back_through_layer(rows: slice, index=index, layer=layer, below=below) -> None:
                graph = graphs.pop(index) if keeps_graphs(rows) else None
                if graph is None:
                    hidden = _leaf(below.fetch(0, rows))
                    with torch.enable_grad():
                        graph = Graph(hidden, variant.run(index, layer, hidden, **inputs))
                trained = variant.trained(self.weights.family.prefix(index))
                states.store(0, rows, _gradients(graph, states.fetch(0, rows), trained))

            yield from self._micro_batches(len(wave), back_through_layer)
            del layer, below, back_through_layer

    def _my_batches(self) -> list[torch.Tensor]:
        """Ids of the blocks of this rank's micro-batches: a run of them, rank 0's the longest."""
        rank, size = ranks.current()
        batches = torch.arange(len(self.tokens)).split(self.batch)
        first, last = (-(-r * len(batches) // size) for r in (rank, rank + 1))  # rounded up
        return list(batches[first:last])

    def _left(self) -> list[torch.Tensor]:
        """Micro-batches that the journal lacks, or has in part only."""
        batches = self._my_batches()
        if not batches:
            return batches
        done = torch.zeros(len(self.tokens), dtype=torch.bool)
        for part in self.journal.restore(Part(int(batches[0][0]), int(batches[-1][-1]) + 1), self.observers):
            done[part.first : part.end] = True
        return [batch for batch in batches if not done[batch].all()]

    def _waves(self, at_once: int) -> list[torch.Tensor]:
        """Ids of each wave's blocks, a run of them, in order; at_once: how many hidden states of a block wait at a time."""
        batches = self._batches
        if self.weights.resident or not batches:
            return batches
        room = HOST_SHARE * free_bytes(torch.device("cpu")) / ranks.on_this_host()
        per_wave = max(1, int(room // self._state_bytes(len(batches[0]), at_once)))
        if self.journal:
            per_wave = min(per_wave, max(1, WAVE_TOKENS // (batches[0].numel() * self.seq_len * len(self.variants))))
        waves: list[list[torch.Tensor]] = []
        for batch in batches:
            goes_on = waves and len(waves[-1]) < per_wave and waves[-1][-1][-1] + 1 == batch[0]
            waves[-1].append(batch) if goes_on else waves.append([batch])
        return [torch.cat(wave) for wave in waves]

    def _state_bytes(self, num_blocks: int, at_once: int) -> int:
        width, itemsize = self.weights.embedding.shape[1], self.weights.precision.residual.itemsize
        return num_blocks * self.seq_len * width * itemsize * at_once

    def _embed(self, wave: torch.Tensor, variants: int, at_once: int) -> States:
        """Embedded blocks for each of the variants, where ``at_once`` as large tensors have room."""
        weights = self.weights
        ids = self.tokens[wave].to(weights.embedding.device)
        room = DEVICE_SHARE * free_bytes(self.device, weights.placement.max_bytes)
        if weights.resident or self.device.type == "cpu" or self._state_bytes(len(wave), at_once) <= room:
            return OnDevice([weights.embedding[ids].to(self.device) for _ in range(variants)])
        shape = (*ids.shape, weights.embedding.shape[1])
        waiting = InHostMemory.empty(shape, weights.embedding.dtype, variants, self.device)
        for value in waiting.values:
            torch.index_select(weights.embedding, 0, ids.flatten(), out=value.view(-1, value.shape[-1]))
        return waiting

    def _layer_inputs(self) -> dict:
        like = torch.empty(0, dtype=self.weights.precision.residual, device=self.device)
        return {"position_ids": self.positions, "position_embeddings": self.weights.rotary(like, self.positions)}

    def _announce_next(self, states: States, variant: int, rows: slice, count: int) -> None:
        """Have the next hidden states brought to the device while these are computed."""
        if rows.stop < count:
            states.prefetch(variant, slice(rows.stop, min(rows.stop + self.batch, count)))
        elif variant + 1 < len(self.variants):
            states.prefetch(variant + 1, slice(0, min(self.batch, count)))

    def _micro_batches(self, count: int, work: Callable[[slice], None]) -> Iterator[int]:
        """Do ``work(rows)`` for all rows of a wave; where memory runs out, again with half as many, and so from then on."""
        start = 0
        while start < count:
            rows = slice(start, min(start + self.batch, count))
            try:
                work(rows)
            except torch.OutOfMemoryError as error:
                self._retreat(error)
                continue
            yield (rows.stop - rows.start) * self.seq_len
            start = rows.stop

    def _retreat(self, error: torch.OutOfMemoryError) -> None:
        room = self.weights.room  # also the next traversal's
        if room.for_graphs and self.weights.backend.training:
            room.for_graphs = False
            torch.cuda.empty_cache()
            warnings.warn(f"{self.device} ran out of memory: layers are computed again on the way back", stacklevel=2)
            return
        if self.batch == 1:
            raise ScoringError(
                f"{self.device} has too little memory for one block of {self.seq_len} tokens: {error}. Use shorter "
                "sequences, raise max_gpu_memory, or free the memory other programs hold."
            ) from error
        self.batch //= 2
        room.tokens = self.batch * self.seq_len
        for observer in self.observers:
            observer.shrink()
        torch.cuda.empty_cache()
        warnings.warn(
            f"{self.device} ran out of memory: going on with {self.batch} blocks of {self.seq_len} at once",
            stacklevel=2,
        )


@dataclass(frozen=True)
class Graph:
    """What a layer, or the loss, was given, and what it made of that, with the graph between."""

    hidden: torch.Tensor
    value: torch.Tensor


def _leaf(hidden: torch.Tensor) -> torch.Tensor:
    return hidden.detach().requires_grad_()


def _gradients(graph: Graph, arriving: torch.Tensor | None, trained: list[torch.Tensor]) -> torch.Tensor:
    """The gradient for the hidden states; those for what is trained are added to its ``grad``, all or, if memory is short,
    none."""
    of_hidden, *found = torch.autograd.grad(graph.value, [graph.hidden, *trained], arriving)
    for parameter, gradient in zip(trained, found, strict=True):
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    return of_hidden
