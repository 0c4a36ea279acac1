"""Rotary position embedding of queries and keys: each value read and written once."""

import torch
import triton
import triton.language as tl


@triton.jit
def _rotate(x, out, cos, sin, heads, HEADS: tl.constexpr, HALF: tl.constexpr):
    head = tl.arange(0, HEADS)[:, None]
    at = head * 2 * HALF + tl.arange(0, HALF)[None, :]
    first = tl.load(x + at, mask=head < heads).to(tl.float32)
    second = tl.load(x + at + HALF, mask=head < heads).to(tl.float32)
    tl.store(out + at, (first * cos - second * sin).to(out.dtype.element_ty), mask=head < heads)
    tl.store(out + at + HALF, (second * cos + first * sin).to(out.dtype.element_ty), mask=head < heads)


@triton.jit
def _rotary(
    query, key, rotated_query, rotated_key, cos, sin, length, query_heads, key_heads,
    QUERY_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    angle = (token % length) * HALF + tl.arange(0, HALF)[None, :]
    c = tl.load(cos + angle).to(tl.float32)
    s = tl.load(sin + angle).to(tl.float32)
    at = token * query_heads * 2 * HALF
    _rotate(query + at, rotated_query + at, c, s, query_heads, QUERY_HEADS, HALF)
    at = token * key_heads * 2 * HALF
    _rotate(key + at, rotated_key + at, c, s, key_heads, KEY_HEADS, HALF)


def rotate(query, key, cos, sin):
    """query [B, S, Hq, D] and key [B, S, Hkv, D] rotated by cos and sin [S, D / 2].

    Halves of D belong together: (x1, x2) becomes (x1 cos - x2 sin, x2 cos + x1 sin). D is a power of two. Not in place:
    where threads outnumber values, several hold the same one, and one may store before another has loaded.
    """
    batch, length, query_heads, dim = query.shape
    key_heads = key.shape[2]
    query, key, cos, sin = (
        x.contiguous() for x in (query, key, cos, sin)
    )  # cos and sin are not, as transformers makes them
    rotated = torch.empty_like(query), torch.empty_like(key)
    _rotary[(batch * length,)](
        query, key, *rotated, cos, sin, length, query_heads, key_heads,
        triton.next_power_of_2(query_heads), triton.next_power_of_2(key_heads), dim // 2, num_warps=4,
    )  # fmt: skip
    return rotated
