"""MXFP4 to floating point.

transformers' own conversion gives the same bits and is what tests compare with. It holds indices as large as the result and a
transposed copy of it, and goes on on the CPU where that is too much; this one holds one expert's float32 values beside it.
"""

import torch

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SCALE_BIAS = 127


def decode(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values [E, ..., G * 32] in ``dtype`` of blocks uint8 [E, ..., G, 16] and scales uint8 [E, ..., G], on their device.

    The even value of each pair lies in a byte's low nibble; a scale is an exponent of two plus 127. Exact in bfloat16
    and wider.
    """
    values = torch.empty((*scales.shape, 2 * blocks.shape[-1]), dtype=dtype, device=blocks.device)
    table = _byte_table(blocks.device)
    for block, scale, value in zip(blocks, scales, values, strict=True):  # one expert's float32 values at a time
        exponents = (scale.int() - SCALE_BIAS)[..., None, None]
        half = exponents >> 1
        value.copy_(table[block.int()].mul_(_power(half)).mul_(_power(exponents - half)).flatten(-2))
    return values.flatten(-2)


def _power(exponents: torch.Tensor) -> torch.Tensor:
    """2^exponents of int32, -126 to 127. ``ldexp`` is slower, and 2^128, which a scale may be, is infinite in torch 2.10."""
    return ((exponents + 127) << 23).view(torch.float32)


def _byte_table(device: torch.device) -> torch.Tensor:
    """float32 [256, 2]: the two values of every byte, low nibble first."""
    values = torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=torch.float32, device=device)
    byte = torch.arange(256, device=device)
    return torch.stack([values[byte & 15], values[byte >> 4]], dim=-1)
