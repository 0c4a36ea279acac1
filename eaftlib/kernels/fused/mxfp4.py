"""MXFP4 to floating point: every packed byte read once, every value written once."""

import torch
import triton
import triton.language as tl


@triton.jit
def _value(code):
    """E2M1: sign, two exponent bits, one mantissa bit. 0 and 1 are 0 and 0.5; above, (2 + mantissa) 2^(exponent - 2)."""
    exponent = ((code >> 1) & 3).to(tl.int32)
    mantissa = (code & 1).to(tl.float32)
    power = ((exponent + 125) << 23).to(tl.float32, bitcast=True)
    magnitude = tl.where(exponent == 0, mantissa * 0.5, (mantissa + 2.0) * power)
    return magnitude * (1.0 - ((code >> 2) & 2).to(tl.float32))  # a product keeps the sign of zero


@triton.jit
def _decode(blocks, scales, values, groups, GROUPS: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside = group < groups
    byte = tl.load(blocks + group[:, None] * 16 + tl.arange(0, 16)[None, :], mask=inside[:, None], other=0)
    exponent = tl.load(scales + group, mask=inside, other=127).to(tl.int32) - 127
    # 2^exponent as a product of two: each factor is a normal number over the whole range of scales.
    half = exponent >> 1
    first = ((half + 127) << 23).to(tl.float32, bitcast=True)[:, None, None]
    second = ((exponent - half + 127) << 23).to(tl.float32, bitcast=True)[:, None, None]
    pairs = tl.join(_value(byte), _value(byte >> 4)) * first * second
    wide = tl.reshape(pairs, [GROUPS, 32]).to(values.dtype.element_ty)
    tl.store(values + group[:, None] * 32 + tl.arange(0, 32)[None, :], wide, mask=inside[:, None])


def decode(blocks, scales, dtype, *, groups=128, num_warps=4):
    """As ``kernels.mxfp4.decode``."""
    values = torch.empty((*scales.shape, 32), dtype=dtype, device=blocks.device)
    total = scales.numel()
    _decode[(triton.cdiv(total, groups),)](
        blocks.contiguous(), scales.contiguous(), values, total, groups, num_warps=num_warps
    )
    return values.flatten(-2)
