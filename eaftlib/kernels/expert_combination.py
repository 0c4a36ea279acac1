"""What follows an expert's second projection: bias, router weight, sum over the token's experts, and their measures."""

import torch


def combine(
    outputs: torch.Tensor,
    row_of_pair: torch.Tensor,
    expert: torch.Tensor,
    gate: torch.Tensor,
    bias: torch.Tensor,
    measure: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(sum_k gate_k y_k [T, H], ||y_k||_2 float32 [T, top_k], max |y_k| float32 [T, top_k]), y = output + bias.

    outputs [P, H] in any order of pairs; row_of_pair int [T, top_k] finds a pair's row; expert int and gate [T, top_k];
    bias [E, H]. Computed in float32; the sum has outputs' dtype. Without ``measure`` the last two are None.
    """
    y = outputs[row_of_pair].float() + bias[expert.long()].float()
    combined = torch.einsum("tkh,tk->th", y, gate.float()).to(outputs.dtype)
    if not measure:
        return combined, None, None
    return combined, torch.linalg.vector_norm(y, dim=-1), y.abs().amax(-1)


def combine_backward(
    arriving: torch.Tensor,
    outputs: torch.Tensor,
    row_of_pair: torch.Tensor,
    expert: torch.Tensor,
    gate: torch.Tensor,
    bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients for outputs [P, H], each row's also its expert's bias's, and for gate float32 [T, top_k].

    arriving: that for the combined sum [T, H]. Computed in float32; the first has outputs' dtype.
    """
    arriving = arriving.float()
    y = outputs[row_of_pair].float() + bias[expert.long()].float()
    of_outputs = torch.empty_like(outputs)
    of_outputs[row_of_pair] = (gate.float()[..., None] * arriving[:, None]).to(outputs.dtype)
    return of_outputs, torch.einsum("tkh,th->tk", y, arriving)
