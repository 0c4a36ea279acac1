"""The experts of one layer, computed once, with the numbers that saliency needs taken on the way.

Registered with transformers' experts interface, so that its own modules call them. Tokens are sorted by expert. ``grouped``
does all experts at once, without the host waiting for the routing; ``by_expert`` takes each expert's rows through its two
projections together, which keeps them in a CPU's cache, and has gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from transformers.integrations.moe import ExpertsInterface

from ..kernels.expert_activation import activate
from ..kernels.expert_combination import combine

BY_EXPERT, GROUPED = "measured_by_expert", "measured_grouped"


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


def grouped(self, hidden_states, top_k_index, top_k_weights, measure, activate=activate, combine=combine):
    """(weighted sum [T, H], norms and peaks [T, top_k] or None) by grouped products; activate, combine: of ``kernels``."""
    tokens, top_k = top_k_index.shape
    ids = id_type(self.num_experts)
    expert, order = top_k_index.flatten().to(ids).sort(stable=True)  # of bytes: one radix pass
    ends = torch.searchsorted(
        expert, torch.arange(self.num_experts, dtype=ids, device=expert.device), right=True, out_int32=True
    )
    row_of_pair = torch.empty_like(order)
    row_of_pair[order] = torch.arange(len(order), device=order.device)
    gate_up = F.grouped_mm(hidden_states[order // top_k], self.gate_up_proj, offs=ends)
    activated = activate(gate_up, self.gate_up_proj_bias, expert, self.limit, self.alpha)
    del gate_up
    outputs = F.grouped_mm(activated, self.down_proj, offs=ends)
    return combine(outputs, row_of_pair.view(tokens, top_k), top_k_index, top_k_weights, self.down_proj_bias, measure)


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


ExpertsInterface.register(BY_EXPERT, measured(by_expert))
