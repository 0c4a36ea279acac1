"""What every expert would have made of a sample of tokens: Gram matrices of their outputs, and the router's logits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ..errors import ParameterError
from ..text.packs import Blocks
from . import ranks
from .observers import Observer, Step, before
from .placement import free_bytes
from .weights import Weights

# Tokens x experts computed at once. An ordinary micro-batch of gpt-oss has 65,536 routed pairs on a GPU, 16,384 on a CPU.
PAIRS_AT_ONCE = {"cpu": 4096, "cuda": 16384}


@dataclass(frozen=True)
class GramTrace:
    """Of T sampled tokens, host tensors, float32; rows in order of block and position; zeros in layers without experts.

    grams [L, T, E (E + 1) / 2]: inner products of all experts' outputs f_j(x), biases included and before any router
    weight; the upper triangle, row by row. logits [L, T, E]: of the router.
    """

    grams: torch.Tensor
    logits: torch.Tensor

    @classmethod
    def empty(cls, layers: int, tokens: int, num_experts: int) -> "GramTrace":
        """Zeros. Raises ParameterError where host memory does not hold them, before any weight is read."""
        values = num_experts * (num_experts + 1) // 2
        _require_room(layers * tokens * values * 4, tokens)
        # Pages that are written to count as taken when the room for waiting hidden states is measured; torch.zeros' do not.
        return cls(*(torch.empty(layers, tokens, size).zero_() for size in (values, num_experts)))

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.grams, self.logits]


class Grams(Observer):
    """Fills a GramTrace during a pass of a single variant.

    Every expert is run on the sampled tokens, some at a time, by the same function that runs the routed ones. Host
    memory: tokens x layers x E (E + 1) / 2 x 4 bytes (4,096 tokens of gpt-oss-20b: 0.2 GB, of 120b: 4.9 GB), for
    each process.
    """

    def __init__(self, weights: Weights, blocks: Blocks, tokens: int):
        """tokens: how many are sampled, at most what there is."""
        checkpoint, self.weights = weights.checkpoint, weights
        self.moe = frozenset(weights.family.moe_layers(checkpoint.config))
        self.sampled = torch.from_numpy(sampled_positions(blocks, tokens))
        self.sampled_before = before(self.sampled)
        self.pairs = PAIRS_AT_ONCE[weights.device.type]
        self.trace = GramTrace.empty(checkpoint.num_layers, int(self.sampled.sum()), checkpoint.num_experts)

    def noted(self, first: int, end: int) -> dict[str, torch.Tensor]:
        rows = slice(self.sampled_before[first], self.sampled_before[end])
        return {"grams": self.trace.grams[:, rows], "logits": self.trace.logits[:, rows]}

    def shrink(self) -> None:
        self.pairs = max(1, self.pairs // 2)

    @contextmanager
    def around(self, step: Step, layer: nn.Module) -> Iterator[None]:
        rows = self.sampled[step.blocks].flatten().nonzero().squeeze(1).to(self.weights.device)
        if step.layer not in self.moe or not len(rows):
            yield
            return
        family, first = self.weights.family, int(self.sampled_before[step.blocks[0]])
        grams, logits = (tensor[step.layer, first : first + len(rows)] for tensor in self.trace.tensors)
        experts = family.experts(layer)
        routing = family.router(layer).register_forward_hook(lambda router, args, out: _copy(logits, out[0][rows]))
        experts.watch = lambda hidden, compute: self._fill(grams, hidden[rows], compute)
        try:
            yield
        finally:
            routing.remove()
            del experts.watch

    def _fill(self, grams: torch.Tensor, hidden: torch.Tensor, compute: Callable) -> None:
        num_experts = self.trace.logits.shape[-1]
        at_once = max(1, self.pairs // num_experts)
        for start in range(0, len(hidden), at_once):
            outputs = outputs_of_all(compute, hidden[start : start + at_once], num_experts)
            grams[start : start + at_once].copy_(upper_triangles(outputs))


def sampled_positions(blocks: Blocks, tokens: int) -> np.ndarray:
    """bool [num_blocks, seq_len]: ``tokens`` positions, evenly spaced among those that predict a kept token."""
    predictors = np.zeros(blocks.kept.shape, bool)
    predictors[:, :-1] = blocks.kept[:, 1:]
    found = np.flatnonzero(predictors)
    count = min(tokens, len(found))
    sampled = np.zeros(predictors.size, bool)
    sampled[found[np.arange(count) * len(found) // max(1, count)]] = True
    return sampled.reshape(predictors.shape)


def outputs_of_all(compute: Callable, hidden: torch.Tensor, num_experts: int) -> torch.Tensor:
    """[T, E, H]: what every expert makes of hidden [T, H]. compute: as ``experts.grouped``, of one layer."""
    ids = torch.arange(num_experts, device=hidden.device).repeat(len(hidden))[:, None]
    outputs, *_ = compute(hidden.repeat_interleave(num_experts, 0), ids, hidden.new_ones(len(ids), 1), False)
    return outputs.view(len(hidden), num_experts, -1)


def upper_triangles(outputs: torch.Tensor) -> torch.Tensor:
    """float32 [T, E (E + 1) / 2]: inner products of outputs [T, E, H] over H, as GramTrace holds them."""
    outputs = outputs.float()
    i, j = torch.triu_indices(outputs.shape[1], outputs.shape[1], device=outputs.device)
    return torch.bmm(outputs, outputs.mT)[:, i, j]


def _copy(target: torch.Tensor, values: torch.Tensor) -> None:
    """In a hook, whose own return value would replace the module's."""
    target.copy_(values)


def _require_room(needed: int, tokens: int) -> None:
    free = free_bytes(torch.device("cpu")) // ranks.on_this_host()
    if needed > free:
        raise ParameterError(
            f"recon_tokens: the Gram matrices of {tokens:,} tokens take {needed / 1e9:.1f} GB of host memory, of which "
            f"{free / 1e9:.1f} GB are free for this process. Set recon_tokens to {tokens * free // (2 * needed):,} or "
            "less, or leave recon out of criteria."
        )
