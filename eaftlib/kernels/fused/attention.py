"""Causal attention with sinks, over everything before or over a sliding window; no mask is ever stored.

The running softmax of flash attention (Dao et al. 2022, arXiv:2205.14135) starts at the sink: maximum s, sum 1, output 0,
which is what one key with logit s and value 0 leaves behind.
"""

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _visit(
    q, k, v, k_step, v_step, start, rows, length, window, scale, top, total, acc, EDGE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Fold keys start to start + BN into the running softmax; EDGE: some of them are not every row's to see."""
    columns = start + tl.arange(0, BN)
    if EDGE:
        keys = tl.load(k + start * k_step, mask=(columns < length)[None, :], other=0.0)
    else:
        keys = tl.load(k + start * k_step)
    logits = tl.dot(q, keys) * scale
    if EDGE:
        seen = (columns[None, :] <= rows[:, None]) & (columns[None, :] > rows[:, None] - window)
        logits = tl.where(seen, logits, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, axis=1))
    weights = tl.exp2(logits - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, axis=1)
    if EDGE:
        values = tl.load(v + start * v_step, mask=(columns < length)[:, None], other=0.0)
    else:
        values = tl.load(v + start * v_step)
    acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None])
    return new_top, total, acc


@triton.jit
def _attention(
    q, k, v, sinks, out, q_batch, q_head, q_step, k_batch, k_head, k_step, v_batch, v_head, v_step,
    length, window, scale, heads, GROUPS: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM  # the longest rows start first
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    kv_head = (head // GROUPS).to(tl.int64)
    rows = first_row + tl.arange(0, BM)
    dim = tl.arange(0, D)
    column = tl.arange(0, BN)
    q += batch * q_batch + head.to(tl.int64) * q_head
    k += batch * k_batch + kv_head * k_head + column[None, :] * k_step + dim[:, None]
    v += batch * v_batch + kv_head * v_head + column[:, None] * v_step + dim[None, :]
    queries = tl.load(q + rows[:, None].to(tl.int64) * q_step + dim[None, :], mask=(rows < length)[:, None], other=0.0)
    scale *= LOG2_E
    top = tl.zeros([BM], tl.float32) + tl.load(sinks + head).to(tl.float32) * LOG2_E
    total = tl.full([BM], 1.0, tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    # Keys that every row of this program sees need no comparison: after the last row's window begins, before row 0.
    begin = tl.maximum(first_row - window + 1, 0) // BN * BN
    whole = tl.minimum((tl.maximum(first_row + BM - window, 0) + BN - 1) // BN * BN, first_row)
    for start in range(begin, whole, BN):
        top, total, acc = _visit(
            queries, k, v, k_step, v_step, start, rows, length, window, scale, top, total, acc, True, BN
        )
    for start in range(whole, first_row, BN):
        top, total, acc = _visit(
            queries, k, v, k_step, v_step, start, rows, length, window, scale, top, total, acc, False, BN
        )
    for start in range(first_row, tl.minimum(first_row + BM, length), BN):
        top, total, acc = _visit(
            queries, k, v, k_step, v_step, start, rows, length, window, scale, top, total, acc, True, BN
        )
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    at = ((batch * length + rows[:, None]) * heads + head) * D + dim[None, :]
    tl.store(out + at, result, mask=(rows < length)[:, None])


def attention(query, key, value, sinks, scaling, window, *, tile=None):
    """query [B, S, Hq, D], key and value [B, S, Hkv, D] (last dim contiguous), sinks [Hq] -> [B, S, Hq, D].

    Query i sees keys max(0, i - window + 1) to i. D is a power of two from 16 on. tile (queries, keys, warps, stages),
    queries a multiple of keys: chosen on an H100 at 1,024 to 16,384 tokens; 128 queries pay off in long full layers only.
    """
    batch, length, heads, dim = query.shape
    window = min(window, length)
    bm, bn, num_warps, num_stages = tile or (
        (128, 64, 4, 3) if window >= 8192 else (64, 64, 4, 3 if window > 512 else 2)
    )
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    strides = [x.stride(i) for x in (query, key, value) for i in (0, 2, 1)]
    _attention[(triton.cdiv(length, bm), heads, batch)](
        query, key, value, sinks, out, *strides, length, window, scaling, heads, heads // key.shape[2], dim, bm, bn,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out
