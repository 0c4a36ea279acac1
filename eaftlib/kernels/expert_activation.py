"""What stands between an expert's two projections: bias and clamped SwiGLU."""

import torch


def activate(
    gate_up: torch.Tensor,
    bias: torch.Tensor,
    expert: torch.Tensor,
    limit: float,
    alpha: float,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """(up + 1) * gate * sigmoid(alpha * gate), [P, I] from gate_up [P, 2I], bias [E, 2I] and each row's expert int [P].

    Gate and up alternate (even, odd columns) and have their bias added; gate is clipped at ``limit`` from above, up on
    both sides. Computed in float32, returned in ``dtype``, or gate_up's: at a limit of 7 no value passes 56.
    """
    x = gate_up.float() + bias[expert.long()].float()
    gate, up = x[:, ::2].clamp(max=limit), x[:, 1::2].clamp(-limit, limit)
    return ((up + 1) * gate * torch.sigmoid(alpha * gate)).to(dtype or gate_up.dtype)


def activate_backward(
    arriving: torch.Tensor,
    gate_up: torch.Tensor,
    bias: torch.Tensor,
    expert: torch.Tensor,
    limit: float,
    alpha: float,
) -> torch.Tensor:
    """The gradient for gate_up [P, 2I], which is each row's for its expert's bias too, from ``arriving`` [P, I].

    Where gate or up was clipped it is zero. Computed in float32, returned in gate_up's dtype.
    """
    x = gate_up.float() + bias[expert.long()].float()
    gate, up = x[:, ::2].clamp(max=limit), x[:, 1::2].clamp(-limit, limit)
    s, arriving = torch.sigmoid(alpha * gate), arriving.float()
    of_gate = arriving * (up + 1) * s * (1 + alpha * gate * (1 - s)) * (x[:, ::2] <= limit)
    of_up = arriving * gate * s * (x[:, 1::2].abs() <= limit)
    return torch.stack([of_gate, of_up], -1).flatten(1).to(gate_up.dtype)
