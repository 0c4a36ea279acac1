"""What is written down while blocks pass through the layers: statistics of tokens, and what experts did."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ..errors import ScoringError
from ..kernels import token_statistics as kernel
from ..text.packs import Blocks
from .experts import ExpertProbe, ExpertTrace
from .variants import Variant
from .weights import Weights

WEIGHT_TOLERANCE = 0.01  # of a sum of router weights; those of bfloat16 add up to 1 within 0.004


@dataclass(frozen=True)
class Step:
    """One micro-batch of one variant at one decoder layer; blocks: their ids, int64 [B]."""

    layer: int
    variant: int
    blocks: torch.Tensor


class Observer:
    """Sees every step. Where memory runs out a micro-batch is repeated in halves, so what is noted must be overwritten."""

    def around(self, step: Step, layer: nn.Module):
        """A context in which the layer runs."""
        return nullcontext()

    def collect(self, blocks: torch.Tensor, hidden: Sequence[torch.Tensor]) -> None:
        """A micro-batch has passed all layers: hidden [B, S, H] after the final norm, of each variant."""

    def noted(self, first: int, end: int) -> dict[str, torch.Tensor]:
        """Host tensors, by name, that hold what was noted of the blocks from ``first`` up to ``end``: to keep, or to fill."""
        raise NotImplementedError

    def shrink(self) -> None:
        """Memory has run out: from now on take half as much at once."""


class TokenStatistics(Observer):
    """NLL and entropy of every kept token, and its divergence from the whole model's where that is among the variants.

    values: float32 [variants, 2 or 4, N], rows nll, entropy, KL and equal arg-max; tokens in order of block and position.
    """

    def __init__(
        self, weights: Weights, blocks: Blocks, variants: Sequence[Variant], base: int | None, entropy_topk: int
    ):
        """base: which of the variants is the whole model, if others are to be compared with it."""
        self.weights, self.variants, self.base, self.entropy_topk = weights, variants, base, entropy_topk
        self.tokens, self.kept = torch.from_numpy(blocks.tokens).long(), torch.from_numpy(blocks.kept)
        self.kept_before = before(self.kept)
        self.slice = kernel.slice_rows(weights.lm_head.shape[0], weights.device)  # tokens with logits at once
        self.values = torch.zeros(len(variants), 2 if base is None else 4, int(self.kept.sum()))
        self.scored = torch.zeros(len(self.kept), dtype=torch.int32)  # of each block, how many tokens were written down

    def noted(self, first: int, end: int) -> dict[str, torch.Tensor]:
        values = self.values[..., self.kept_before[first] : self.kept_before[end]]
        return {"values": values, "scored": self.scored[first:end]}

    def shrink(self) -> None:
        self.slice = max(1, self.slice // 2)

    def collect(self, blocks: torch.Tensor, hidden: Sequence[torch.Tensor]) -> None:
        kept = self.kept[blocks].flatten().nonzero().squeeze(1)
        if not len(kept):
            return
        targets = self.tokens[blocks].flatten()[kept].to(self.weights.device)
        # Position 0 is never kept: the token before is of the same block.
        predictors = (kept - 1).to(self.weights.device)
        hidden = [h.flatten(0, 1)[predictors] for h in hidden]
        heads = [variant.lm_head for variant in self.variants]
        parts = [
            self._of_slice([h[start : start + self.slice] for h in hidden], heads, targets[start : start + self.slice])
            for start in range(0, len(targets), self.slice)
        ]
        first = int(self.kept_before[blocks[0]])
        values = torch.cat(parts, dim=-1).cpu()
        self.values[..., first : first + len(kept)] = values
        self.scored[blocks] = torch.bincount(kept // self.tokens.shape[1], minlength=len(blocks)).int()
        for variant in values:
            self._require_finite(variant, first)

    def require_complete(self) -> None:
        """Raises ScoringError unless, all ranks and earlier runs together, every kept token was scored once."""
        expected = self.kept.sum(1)
        if len(wrong := (self.scored != expected).nonzero()):
            block = int(wrong[0])
            raise ScoringError(
                f"block {block}: {int(self.scored[block])} tokens were scored, expected its {int(expected[block])} kept ones "
                f"({len(wrong)} such blocks): remove the journal in out_dir and run again"
            )

    def _of_slice(self, hidden: list[torch.Tensor], heads: list[torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
        """[variants, 2 or 4, tokens]"""
        backend, reference = self.weights.backend, None
        found = {}
        for v in sorted(range(len(hidden)), key=lambda v: v != self.base):  # the whole model first
            logits = kernel.logits_of(hidden[v], heads[v])
            rows = backend.token_statistics(logits, targets, self.entropy_topk)
            if self.base is not None:
                reference = reference or backend.reference(logits)
                rows += reference.compare(logits)
            found[v] = torch.stack([row.float() for row in rows])
        return torch.stack([found[v] for v in range(len(hidden))])

    def _require_finite(self, values: torch.Tensor, first: int) -> None:
        bad = ~torch.isfinite(values[:2]).all(0)
        if bad.any():
            at = int(bad.nonzero()[0])
            block, position = self.kept.nonzero()[first + at].tolist()
            nll, entropy = values[:2, at].tolist()
            raise ScoringError(
                f"block {block}, position {position}: nll {nll}, entropy {entropy}; expected finite values "
                f"({int(bad.sum())} bad tokens in this micro-batch). The weights hold NaN or Inf, or "
                f"{self.weights.precision.products} overflowed: verify the checkpoint, or run with dtype float32."
            )


class Experts(Observer):
    """What every expert did at the recorded positions of a single variant; ``trace`` holds it."""

    def __init__(self, weights: Weights, blocks: Blocks):
        checkpoint, self.weights = weights.checkpoint, weights
        self.moe = frozenset(weights.family.moe_layers(checkpoint.config))
        self.recorded = torch.from_numpy(recorded_positions(blocks))
        self.recorded_before = before(self.recorded)
        self.trace = ExpertTrace.empty(
            checkpoint.num_layers, int(self.recorded.sum()), checkpoint.top_k, checkpoint.num_experts, weights.device
        )

    def noted(self, first: int, end: int) -> dict[str, torch.Tensor]:
        rows = slice(self.recorded_before[first], self.recorded_before[end])
        return {name: getattr(self.trace, name)[:, rows] for name in ("expert", "gate", "norm", "peak")}

    @contextmanager
    def around(self, step: Step, layer: nn.Module) -> Iterator[None]:
        if step.layer not in self.moe:
            yield
            return
        rows = self.recorded[step.blocks].flatten().nonzero().squeeze(1).to(self.weights.device)
        experts = self.weights.family.experts(layer)
        experts.probe = ExpertProbe(self.trace, step.layer, int(self.recorded_before[step.blocks[0]]), rows)
        try:
            yield
        finally:
            del experts.probe

    def require_consistent(self) -> None:
        """Raises ScoringError unless each position has top-k different experts whose weights sum to 1, in every MoE layer.

        So every layer's counts of its experts sum to positions x top-k.
        """
        count, top_k = self.weights.checkpoint.num_experts, self.trace.expert.shape[-1]
        for layer in sorted(self.moe):
            total = self.trace.gate[layer].sum(-1)
            self._require(layer, (total - 1).abs() <= WEIGHT_TOLERANCE, "router weights sum to", total, "1")
            ids = self.trace.expert[layer].int().sort(-1).values
            different = (ids[:, 1:] != ids[:, :-1]).all(-1) & (ids[:, -1] < count)
            self._require(layer, different, "experts", ids, f"{top_k} different ones below {count}")

    def _require(self, layer: int, right: torch.Tensor, what: str, found: torch.Tensor, expected: str) -> None:
        if len(wrong := (~right).nonzero()):
            row = int(wrong[0])
            block, position = self.recorded.nonzero()[row].tolist()
            raise ScoringError(
                f"layer {layer}, block {block}, position {position}: {what} {found[row].tolist()}, expected {expected} "
                f"({len(wrong)} of {len(right)} positions): verify the checkpoint; else remove the journal and run again"
            )


def recorded_positions(blocks: Blocks) -> np.ndarray:
    """bool [num_blocks, seq_len]: where a kept token stands or is predicted, the positions where experts are recorded."""
    mask = blocks.kept.copy()
    mask[:, :-1] |= blocks.kept[:, 1:]
    return mask


def before(mask: torch.Tensor) -> torch.Tensor:
    """int64 [num_blocks + 1]: how many positions of ``mask`` lie in earlier blocks; the last counts them all."""
    return torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
