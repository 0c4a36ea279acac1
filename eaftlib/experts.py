"""The experts of one layer, computed once, with the numbers that saliency needs taken on the way.

Registered with transformers' experts interface, so its own gpt-oss modules call it. Tokens are sorted by expert and each
expert's rows go through its two projections together; on a CPU one expert's activations stay in cache.
"""

from dataclasses import dataclass, field

import torch
from transformers.integrations.moe import ExpertsInterface

NAME = "measured"


@dataclass
class ExpertProbe:
    """What the experts of one layer did, one entry per micro-batch, each [T, top_k] on the host.

    expert uint8: routed ids. gate float32: router weight after the top-k softmax, g. norm float32: ||f_j(x)||_2, the
    output before g, biases included. peak float32: the largest absolute element of that output.
    """

    expert: list[torch.Tensor] = field(default_factory=list)
    gate: list[torch.Tensor] = field(default_factory=list)
    norm: list[torch.Tensor] = field(default_factory=list)
    peak: list[torch.Tensor] = field(default_factory=list)
    rows: torch.Tensor | None = None  # rows of the coming micro-batch to keep; None keeps all

    def record(self, expert, gate, norm, peak) -> None:
        for name, values in (("expert", expert.to(torch.uint8)), ("gate", gate), ("norm", norm), ("peak", peak)):
            values = values if self.rows is None else values[self.rows]
            getattr(self, name).append(values.to("cpu", torch.uint8 if name == "expert" else torch.float32))


def experts_forward(self, hidden_states, top_k_index, top_k_weights):
    """transformers' experts interface: hidden_states [T, H], ids and weights [T, top_k] -> [T, H].

    If the module carries ``probe``, the routed pairs' measures are recorded there.
    """
    tokens, top_k = top_k_index.shape
    probe = getattr(self, "probe", None)
    order = top_k_index.flatten().argsort(stable=True)  # pairs sorted by expert
    counts = torch.bincount(top_k_index.flatten(), minlength=self.num_experts).tolist()
    outputs = hidden_states.new_empty(tokens * top_k, hidden_states.shape[1])
    for expert, rows in enumerate(order.split(counts)):
        if len(rows) == 0:
            continue
        gate_up = torch.addmm(self.gate_up_proj_bias[expert], hidden_states[rows // top_k], self.gate_up_proj[expert])
        outputs[rows] = torch.addmm(self.down_proj_bias[expert], self._apply_gate(gate_up), self.down_proj[expert])
    outputs = outputs.view(tokens, top_k, -1)
    if probe is not None:
        measured = outputs.float()
        norm = torch.linalg.vector_norm(measured, dim=-1)
        probe.record(top_k_index, top_k_weights, norm, measured.abs().amax(-1))
    return torch.einsum("tkh,tk->th", outputs, top_k_weights)


ExpertsInterface.register(NAME, experts_forward)
