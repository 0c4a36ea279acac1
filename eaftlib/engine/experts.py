"""The experts of one layer, computed once, with the numbers that saliency needs taken on the way.

Registered with transformers' experts interface, so that its own modules call them. Tokens are sorted by expert. ``grouped``
does all experts at once, without the host waiting for the routing; ``by_expert`` takes each expert's rows through its two
projections together, which keeps them in a CPU's cache, and has gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from transformers.integrations.moe import ExpertsInterface

from ..kernels import expert_activation, expert_combination
from .half import HALF, multiply

BY_EXPERT, GROUPED, HALVES = "measured_by_expert", "measured_grouped", "measured_halves"


def id_type(num_experts: int) -> torch.dtype:
    """The smallest integers that hold expert ids and that can be summed over ranks."""
    return torch.uint8 if num_experts <= 256 else torch.int32


@dataclass(frozen=True)
class ExpertTrace:
    """What the experts did at recorded positions: host tensors [L, R, top_k], rows in order of block and position.

    expert: routed ids, of ``id_type``. gate float32: router weight after the top-k softmax, g. norm float32: ||f_j(x)||_2,
    the output before g, biases included. peak float32: the largest absolute element of that output.
    """

    expert: torch.Tensor
    gate: torch.Tensor
    norm: torch.Tensor
    peak: torch.Tensor

    @classmethod
    def empty(cls, layers: int, rows: int, top_k: int, num_experts: int, device: torch.device) -> "ExpertTrace":
        """Zeros; in pinned memory where a GPU fills them, so that it need not be waited for."""
        pin, shape = device.type == "cuda", (layers, rows, top_k)
        measures = [torch.zeros(shape, pin_memory=pin) for _ in range(3)]
        return cls(torch.zeros(shape, dtype=id_type(num_experts), pin_memory=pin), *measures)

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.expert, self.gate, self.norm, self.peak]


@dataclass(frozen=True)
class ExpertProbe:
    """Writes one layer's measures of one micro-batch into a trace: of its tokens ``rows``, from the trace's row ``first``."""

    trace: ExpertTrace
    layer: int
    first: int
    rows: torch.Tensor

    def record(self, *measures: torch.Tensor) -> None:
        """expert, gate, norm, peak, each [T, top_k] on the device; on a GPU the copies are only started."""
        for target, values in zip(self.trace.tensors, measures, strict=True):
            target = target[self.layer, self.first : self.first + len(self.rows)]
            target.copy_(values[self.rows].to(target.dtype), non_blocking=True)


def measured(compute: Callable) -> Callable:
    """A function for transformers' experts interface: hidden_states [T, H], ids and weights [T, top_k] -> [T, H].

    If the module carries ``probe``, the routed pairs' measures are recorded there. If it carries ``watch``, that is called
    with the tokens and ``compute`` of this module, to run experts on some of them that they were not routed to.
    """

    def experts_forward(self, hidden_states, top_k_index, top_k_weights):
        probe = getattr(self, "probe", None)
        combined, norm, peak = compute(self, hidden_states, top_k_index, top_k_weights, probe is not None)
        if probe is not None:
            probe.record(top_k_index, top_k_weights, norm, peak)
        if (watch := getattr(self, "watch", None)) is not None:
            watch(hidden_states, partial(compute, self))
        return combined

    return experts_forward


@dataclass(frozen=True)
class Between:
    """What stands between the products of ``grouped``, and what leads back through it; functions of ``kernels``."""

    activate: Callable = expert_activation.activate
    activate_backward: Callable = expert_activation.activate_backward
    combine: Callable = expert_combination.combine
    combine_backward: Callable = expert_combination.combine_backward

    @classmethod
    def of(cls, activation: ModuleType, combination: ModuleType) -> "Between":
        """From the modules ``expert_activation`` and ``expert_combination``, plain or fused."""
        return cls(activation.activate, activation.activate_backward, combination.combine, combination.combine_backward)


def grouped(self, hidden_states, top_k_index, top_k_weights, measure, between=Between()):
    """(weighted sum [T, H], norms and peaks [T, top_k] or None) by grouped products.

    Where gradients are wanted and nothing is measured: for the hidden states, the router weights and both biases, none
    for the matrices.
    """
    routing = _Routing.of(top_k_index, self.num_experts)
    matrices = self.gate_up_proj, self.down_proj
    if torch.is_grad_enabled() and not measure:
        settings = self.limit, self.alpha, between
        biases = self.gate_up_proj_bias, self.down_proj_bias
        return _Grouped.apply(hidden_states, top_k_weights, *biases, *matrices, routing, settings), None, None
    gate_up = F.grouped_mm(hidden_states[routing.token_of_row], matrices[0], offs=routing.ends)
    activated = between.activate(gate_up, self.gate_up_proj_bias, routing.expert, self.limit, self.alpha)
    del gate_up
    outputs = F.grouped_mm(activated, matrices[1], offs=routing.ends)
    return between.combine(outputs, routing.row_of_pair, top_k_index, top_k_weights, self.down_proj_bias, measure)


@dataclass(frozen=True)
class _Routing:
    """Pairs of token and expert as rows, in the order of experts: each row's expert and token, where experts end [E]."""

    ids: torch.Tensor
    expert: torch.Tensor
    token_of_row: torch.Tensor
    row_of_pair: torch.Tensor
    ends: torch.Tensor

    @classmethod
    def of(cls, ids: torch.Tensor, num_experts: int) -> "_Routing":
        tokens, top_k = ids.shape
        small = id_type(num_experts)
        expert, order = ids.flatten().to(small).sort(stable=True)  # of bytes: one radix pass
        each = torch.arange(num_experts, dtype=small, device=expert.device)
        ends = torch.searchsorted(expert, each, right=True, out_int32=True)
        row_of_pair = torch.empty_like(order)
        row_of_pair[order] = torch.arange(len(order), device=order.device)
        return cls(ids, expert, order // top_k, row_of_pair.view(tokens, top_k), ends)


class _Grouped(torch.autograd.Function):
    """``grouped`` and its gradients. Of a row are kept: what its first and its second product gave."""

    @staticmethod
    def forward(ctx, hidden, gates, up_bias, down_bias, gate_up_proj, down_proj, routing, settings):
        limit, alpha, between = settings
        gate_up = F.grouped_mm(hidden[routing.token_of_row], gate_up_proj, offs=routing.ends)
        activated = between.activate(gate_up, up_bias, routing.expert, limit, alpha)
        outputs = F.grouped_mm(activated, down_proj, offs=routing.ends)
        ctx.save_for_backward(gate_up, outputs, gates, up_bias, down_bias, gate_up_proj, down_proj)
        ctx.routing, ctx.settings = routing, settings
        return between.combine(outputs, routing.row_of_pair, routing.ids, gates, down_bias, False)[0]

    @staticmethod
    def backward(ctx, arriving):
        gate_up, outputs, gates, up_bias, down_bias, gate_up_proj, down_proj = ctx.saved_tensors
        routing, (limit, alpha, between) = ctx.routing, ctx.settings
        of_outputs, of_gates = between.combine_backward(
            arriving, outputs, routing.row_of_pair, routing.ids, gates, down_bias
        )
        of_activated = F.grouped_mm(of_outputs, down_proj.transpose(1, 2), offs=routing.ends)
        of_gate_up = between.activate_backward(of_activated, gate_up, up_bias, routing.expert, limit, alpha)
        of_rows = F.grouped_mm(of_gate_up, gate_up_proj.transpose(1, 2), offs=routing.ends)
        one, none = torch.ones_like(gates), torch.zeros_like(down_bias)
        of_hidden = between.combine(of_rows, routing.row_of_pair, routing.ids, one, none, False)[0]
        # As a product: a sum over repeated indices has no fast kernel.
        member = F.one_hot(routing.expert.long(), len(up_bias)).T.to(gate_up.dtype)
        of_biases = member @ of_gate_up, member @ of_outputs
        return of_hidden, of_gates.to(gates.dtype), *of_biases, None, None, None, None


def by_expert(self, hidden_states, top_k_index, top_k_weights, measure):
    """As ``grouped``, an expert at a time."""
    tokens, top_k = top_k_index.shape
    order = top_k_index.flatten().argsort(stable=True)
    counts = torch.bincount(top_k_index.flatten(), minlength=self.num_experts).tolist()
    outputs = hidden_states.new_empty(tokens * top_k, hidden_states.shape[1])
    for expert, rows in enumerate(order.split(counts)):
        if len(rows) == 0:
            continue
        gate_up = torch.addmm(self.gate_up_proj_bias[expert], hidden_states[rows // top_k], self.gate_up_proj[expert])
        outputs[rows] = torch.addmm(self.down_proj_bias[expert], self._apply_gate(gate_up), self.down_proj[expert])
    outputs = outputs.view(tokens, top_k, -1)
    combined = torch.einsum("tkh,tk->th", outputs, top_k_weights)
    if not measure:
        return combined, None, None
    measured = outputs.float()
    return combined, torch.linalg.vector_norm(measured, dim=-1), measured.abs().amax(-1)


def halves(self, hidden_states, top_k_index, top_k_weights, measure, between=Between()):
    """As ``grouped``, without gradients: products of float16 operands an expert at a time, all else in float32.

    The module carries ``narrowing``.
    """
    routing = _Routing.of(top_k_index, self.num_experts)
    ends = routing.ends.tolist()
    x = self.narrowing.narrow("hidden states entering the experts", hidden_states)[routing.token_of_row]
    gate_up = _by_rows(x, self.gate_up_proj, ends)
    activated = between.activate(gate_up, self.gate_up_proj_bias, routing.expert, self.limit, self.alpha, HALF)
    del gate_up
    outputs = _by_rows(activated, self.down_proj, ends)
    return between.combine(outputs, routing.row_of_pair, top_k_index, top_k_weights, self.down_proj_bias, measure)


def _by_rows(rows: torch.Tensor, matrices: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """float32 [P, M]: rows [P, K], those of each expert together, times its matrix of [E, K, M]."""
    out = rows.new_empty(len(rows), matrices.shape[2], dtype=torch.float32)
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if start < end:
            multiply(rows[start:end], matrices[expert], out=out[start:end])
    return out


ExpertsInterface.register(BY_EXPERT, measured(by_expert))
