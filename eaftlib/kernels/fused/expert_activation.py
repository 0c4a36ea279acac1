"""Bias and clamped SwiGLU of the experts' first projection, one read and one write."""

import torch
import triton
import triton.language as tl


@triton.jit
def _activate(gate_up, bias, expert, out, size, limit, alpha, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
    inside = pair < 2 * size
    x = tl.load(gate_up + row * 2 * size + pair, mask=inside).to(tl.float32)
    x += tl.load(bias + tl.load(expert + row).to(tl.int64) * 2 * size + pair, mask=inside).to(tl.float32)
    gate, up = tl.split(tl.reshape(x, [BLOCK, 2]))
    # A plain minimum would turn a NaN into the limit and hide damaged weights.
    gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.minimum(tl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL), limit, propagate_nan=tl.PropagateNan.ALL)
    h = (up + 1.0) * gate * tl.sigmoid(alpha * gate)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + row * size + column, h.to(out.dtype.element_ty), mask=column < size)


@triton.jit
def _activate_backward(arriving, gate_up, bias, expert, out, size, limit, alpha, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
    inside = pair < 2 * size
    x = tl.load(gate_up + row * 2 * size + pair, mask=inside).to(tl.float32)
    x += tl.load(bias + tl.load(expert + row).to(tl.int64) * 2 * size + pair, mask=inside).to(tl.float32)
    raw_gate, raw_up = tl.split(tl.reshape(x, [BLOCK, 2]))
    gate, up = tl.minimum(raw_gate, limit), tl.minimum(tl.maximum(raw_up, -limit), limit)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d = tl.load(arriving + row * size + column, mask=column < size).to(tl.float32)
    s = tl.sigmoid(alpha * gate)
    of_gate = tl.where(raw_gate <= limit, d * (up + 1.0) * s * (1.0 + alpha * gate * (1.0 - s)), 0.0)
    of_up = tl.where(tl.abs(raw_up) <= limit, d * gate * s, 0.0)
    both = tl.reshape(tl.join(of_gate, of_up), [2 * BLOCK])
    tl.store(out + row * 2 * size + pair, both.to(out.dtype.element_ty), mask=inside)


def activate(gate_up, bias, expert, limit, alpha, dtype=None, *, block=1024, num_warps=4):
    """As ``kernels.expert_activation.activate``."""
    gate_up, bias, expert = gate_up.contiguous(), bias.contiguous(), expert.contiguous()
    rows, width = gate_up.shape
    out = gate_up.new_empty(rows, width // 2, dtype=dtype)
    grid = (rows, triton.cdiv(width // 2, block))
    _activate[grid](gate_up, bias, expert, out, width // 2, limit, alpha, block, num_warps=num_warps)
    return out


def activate_backward(arriving, gate_up, bias, expert, limit, alpha, *, block=1024, num_warps=4):
    """As ``kernels.expert_activation.activate_backward``."""
    arriving, gate_up, bias, expert = (x.contiguous() for x in (arriving, gate_up, bias, expert))
    rows, width = gate_up.shape
    out = torch.empty_like(gate_up)
    grid = (rows, triton.cdiv(width // 2, block))
    _activate_backward[grid](arriving, gate_up, bias, expert, out, width // 2, limit, alpha, block, num_warps=num_warps)
    return out
