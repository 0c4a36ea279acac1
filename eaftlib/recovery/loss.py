"""The distillation loss: the whole model's next-token distributions are what the pruned one is to give."""

from dataclasses import dataclass

import torch

from ..engine.traversal import Loss
from ..engine.variants import Variant
from ..engine.weights import Weights
from ..kernels.distillation import distillation
from ..kernels.token_statistics import logits_of, slice_rows
from ..text.packs import Blocks


@dataclass(frozen=True)
class Regions:
    """Weight of a kept token by what the teacher makes of it (EAFT, arXiv 2601.02151).

    good: p >= p_lo and H <= h_lo; conflict: p < p_lo and H <= h_lo; uncertain: the rest.
    """

    p_lo: float
    h_lo: float
    good: float
    uncertain: float
    conflict: float
    entropy_topk: int

    def weight(self, nll: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        """[T] from the teacher's nll and entropy [T]."""
        sure, right = entropy <= self.h_lo, (-nll).exp() >= self.p_lo
        weight = torch.where(right, self.good, self.conflict)
        return torch.where(sure, weight, self.uncertain)


class Distillation:
    """sum_t w_t KL(teacher_t, student_t) over the tokens that follow the first of a block, divided by sum_t w_t.

    w_t is 1 for a kept token, times its region's weight where regions are given (the divisor leaves those out), and
    ``other_weight`` for all others.
    """

    def __init__(
        self, weights: Weights, teacher: Variant, student: Variant, other_weight: float, regions: Regions | None
    ):
        self.weights, self.teacher, self.student = weights, teacher, student
        self.other_weight, self.regions = other_weight, regions

    def on(self, blocks: Blocks) -> Loss:
        """The loss on a step's blocks; its parts, of micro-batches, add up to the whole."""
        kept, tokens = torch.from_numpy(blocks.kept[:, 1:]), torch.from_numpy(blocks.tokens[:, 1:]).long()
        base = torch.where(kept, 1.0, self.other_weight)
        total = base.sum(dtype=torch.float64).item()

        def loss(ids: torch.Tensor, hidden: list[torch.Tensor]) -> torch.Tensor:
            chosen = base[ids].flatten().nonzero().squeeze(1)
            w, is_kept, targets = (x[ids].flatten()[chosen].to(self.weights.device) for x in (base, kept, tokens))
            teacher, student = (h[:, :-1].flatten(0, 1)[chosen.to(h.device)] for h in hidden)
            teacher_head, head = self.teacher.lm_head, self.student.lm_head

            def of_slice(rows: slice, student_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                teacher_logits = logits_of(teacher[rows], teacher_head)
                weight = w[rows] * self._region_weight(teacher_logits, targets[rows], is_kept[rows]) / total
                kl, gradient = distillation(student_logits, teacher_logits)
                return kl @ weight, gradient.mul_(weight[:, None])

            return _ThroughHead.apply(student, head, of_slice)

        return loss

    def _region_weight(self, logits: torch.Tensor, targets: torch.Tensor, kept: torch.Tensor) -> torch.Tensor | float:
        if self.regions is None:
            return 1.0
        of_tokens = self.weights.backend.token_statistics(logits, targets, self.regions.entropy_topk)
        return torch.where(kept, self.regions.weight(*of_tokens), 1.0)


class _ThroughHead(torch.autograd.Function):
    """A sum over tokens of a loss on their logits; its gradients are taken at once, so logits of a slice are all that is held.

    of_slice: (rows, their logits [T, V] float32) -> (their loss, its gradient for the logits [T, V]).
    """

    @staticmethod
    def forward(ctx, hidden, head, of_slice):
        loss, of_hidden = hidden.new_zeros((), dtype=torch.float32), torch.empty_like(hidden)
        of_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        size = max(1, slice_rows(len(head), head.device) // 2)  # two models' logits at once
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            part, gradient = of_slice(rows, logits_of(hidden[rows], head))
            gradient = gradient.to(head.dtype)
            loss += part
            of_hidden[rows] = gradient @ head
            if of_head is not None:
                of_head += gradient.T @ hidden[rows]
        ctx.save_for_backward(of_hidden, of_head)
        return loss

    @staticmethod
    def backward(ctx, arriving):
        of_hidden, of_head = ctx.saved_tensors
        return arriving * of_hidden, None if of_head is None else arriving * of_head, None
