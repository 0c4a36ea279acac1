"""Bias, measuring and weighted sum of the experts' outputs, one read of them."""

import torch
import triton
import triton.language as tl


@triton.jit
def _combine(
    outputs, row_of_pair, expert, gate, bias, combined, norm, peak,
    size, top_k, PAIRS: tl.constexpr, BLOCK: tl.constexpr, MEASURE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, PAIRS)
    routed = pair < top_k
    rows = tl.load(row_of_pair + token * top_k + pair, mask=routed, other=0).to(tl.int64)
    experts = tl.load(expert + token * top_k + pair, mask=routed, other=0).to(tl.int64)
    gates = tl.load(gate + token * top_k + pair, mask=routed, other=0.0).to(tl.float32)
    squares = tl.zeros([PAIRS, BLOCK], tl.float32)
    largest = tl.zeros([PAIRS, BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = routed[:, None] & (column < size)[None, :]
        y = tl.load(outputs + rows[:, None] * size + column[None, :], mask=inside, other=0.0).to(tl.float32)
        y += tl.load(bias + experts[:, None] * size + column[None, :], mask=inside, other=0.0).to(tl.float32)
        total = tl.sum(y * gates[:, None], axis=0)
        tl.store(combined + token * size + column, total.to(combined.dtype.element_ty), mask=column < size)
        if MEASURE:
            squares += y * y
            largest = tl.maximum(largest, tl.abs(y))
    if MEASURE:
        tl.store(norm + token * top_k + pair, tl.sqrt(tl.sum(squares, axis=1)), mask=routed)
        tl.store(peak + token * top_k + pair, tl.max(largest, axis=1), mask=routed)


def combine(outputs, row_of_pair, expert, gate, bias, measure, *, block=1024, num_warps=4):
    """As ``kernels.expert_combination.combine``."""
    outputs, row_of_pair, expert, gate, bias = (x.contiguous() for x in (outputs, row_of_pair, expert, gate, bias))
    tokens, top_k = expert.shape
    size = outputs.shape[1]
    combined = outputs.new_empty(tokens, size)
    norm, peak = torch.empty(2, tokens, top_k, device=outputs.device).unbind() if measure else (combined, combined)
    _combine[(tokens,)](
        outputs, row_of_pair, expert, gate, bias, combined, norm, peak,
        size, top_k, triton.next_power_of_2(top_k), block, measure, num_warps=num_warps,
    )  # fmt: skip
    return (combined, norm, peak) if measure else (combined, None, None)


@triton.jit
def _combine_backward(
    arriving, outputs, row_of_pair, expert, gate, bias, of_outputs, of_gate,
    size, top_k, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, PAIRS)
    routed = pair < top_k
    rows = tl.load(row_of_pair + token * top_k + pair, mask=routed, other=0).to(tl.int64)
    experts = tl.load(expert + token * top_k + pair, mask=routed, other=0).to(tl.int64)
    gates = tl.load(gate + token * top_k + pair, mask=routed, other=0.0).to(tl.float32)
    total = tl.zeros([PAIRS, BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = routed[:, None] & (column < size)[None, :]
        d = tl.load(arriving + token * size + column, mask=column < size, other=0.0).to(tl.float32)
        y = tl.load(outputs + rows[:, None] * size + column[None, :], mask=inside, other=0.0).to(tl.float32)
        y += tl.load(bias + experts[:, None] * size + column[None, :], mask=inside, other=0.0).to(tl.float32)
        total += y * d[None, :]
        of_row = (gates[:, None] * d[None, :]).to(of_outputs.dtype.element_ty)
        tl.store(of_outputs + rows[:, None] * size + column[None, :], of_row, mask=inside)
    tl.store(of_gate + token * top_k + pair, tl.sum(total, axis=1), mask=routed)


def combine_backward(arriving, outputs, row_of_pair, expert, gate, bias, *, block=1024, num_warps=4):
    """As ``kernels.expert_combination.combine_backward``."""
    arriving, outputs, row_of_pair, expert, gate, bias = (
        x.contiguous() for x in (arriving, outputs, row_of_pair, expert, gate, bias)
    )
    tokens, top_k = expert.shape
    of_outputs, of_gate = torch.empty_like(outputs), outputs.new_empty(tokens, top_k, dtype=torch.float32)
    _combine_backward[(tokens,)](
        arriving, outputs, row_of_pair, expert, gate, bias, of_outputs, of_gate,
        outputs.shape[1], top_k, triton.next_power_of_2(top_k), block, num_warps=num_warps,
    )  # fmt: skip
    return of_outputs, of_gate
