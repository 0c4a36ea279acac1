"""Rotary position embedding of queries and keys."""

import torch


def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [B, S, Hq, D] and key [B, S, Hkv, D] rotated by cos and sin [S, D / 2], in their type.

    Halves of D belong together: (x1, x2) becomes (x1 cos - x2 sin, x2 cos + x1 sin).
    """
    cos, sin = cos[:, None], sin[:, None]

    def rotated(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    return rotated(query), rotated(key)
