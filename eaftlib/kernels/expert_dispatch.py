"""What precedes an expert's first projection: each token's hidden state, once for every expert that it is routed to."""

import torch


def dispatch(hidden: torch.Tensor, row_of_pair: torch.Tensor) -> torch.Tensor:
    """[T * top_k, H]: row row_of_pair[t, k] is hidden[t], of hidden [T, H]; row_of_pair int [T, top_k] has every row once."""
    rows = hidden.new_empty(row_of_pair.numel(), hidden.shape[1])
    for row in row_of_pair.unbind(1):
        rows[row] = hidden
    return rows
