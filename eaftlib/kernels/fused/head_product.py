"""Logits, and on the way of each row and tile of columns their maximum and sum of exponentials.

The product's epilogue holds the tile in registers, so these cost next to nothing; statistics then need 1/40 of the logits
again instead of all. A persistent grid over tensor descriptors, for Hopper and later: there it keeps up with the vendor's
library, elsewhere it would not.
"""

import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .token_statistics import top_entropy, top_places

WIDTH = 256  # columns of a tile
_LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _product(
    hidden, head, logits, tops, sums, tokens, vocab, size,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    down = tl.cdiv(tokens, ROWS)
    across = tl.cdiv(vocab, COLUMNS)
    for tile in range(tl.program_id(0), down * across, tl.num_programs(0)):
        # BAND tiles below each other come in turn: they share their columns of the head while those are in cache.
        band = tile // (BAND * across) * BAND
        height = tl.minimum(down - band, BAND)
        inside = tile % (BAND * across)
        row = (band + inside % height) * ROWS
        tile_across = inside // height
        z = tl.zeros([ROWS, COLUMNS], tl.float32)
        for depth in range(0, size, DEPTH):
            z = tl.dot(hidden.load([row, depth]), head.load([tile_across * COLUMNS, depth]).T, z)
        rows = row + tl.arange(0, ROWS)
        columns = tile_across * COLUMNS + tl.arange(0, COLUMNS)
        z = tl.where((columns < vocab)[None, :], z, _LOWEST)
        top = tl.max(z, axis=1)
        total = tl.sum(tl.exp(z - top[:, None]), axis=1)
        at = rows.to(tl.int64) * across + tile_across
        tl.store(tops + at, top, mask=rows < tokens)
        tl.store(sums + at, total, mask=rows < tokens)
        at = rows[:, None].to(tl.int64) * vocab + columns[None, :]
        tl.store(logits + at, z, mask=(rows < tokens)[:, None] & (columns < vocab)[None, :])


@triton.jit
def _statistics_of_tiles(
    logits, tops, sums, targets, nll, entropy, vocab, tiles, inverse_ln_k,
    K: tl.constexpr, TILES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One row per program. The K largest logits lie in the K tiles of largest maxima: only those are read."""
    row = tl.program_id(0).to(tl.int64)
    z = logits + row * vocab
    tile = tl.arange(0, TILES)
    highest = tl.load(tops + row * tiles + tile, mask=tile < tiles, other=_LOWEST)
    total = tl.load(sums + row * tiles + tile, mask=tile < tiles, other=0.0)
    top = tl.max(highest, axis=0)
    normaliser = tl.sum(total * tl.exp(highest - top), axis=0)
    tl.store(nll + row, (top - tl.load(z + tl.load(targets + row))) + tl.log(normaliser))
    columns = top_places(highest, TILES, K)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    candidates = tl.load(z + columns, mask=(tl.arange(0, 32)[:, None] < K) & (columns < vocab), other=_LOWEST)
    h = top_entropy(tl.reshape(candidates, [32 * COLUMNS]), top, 32 * COLUMNS, K) * inverse_ln_k
    tl.store(entropy + row, tl.where(normaliser == normaliser, tl.minimum(tl.maximum(h, 0.0), 1.0), normaliser))


def product(hidden, head, *, rows=128, depth=64, band=16, num_warps=8, num_stages=3, programs=None):
    """(logits float32 [T, V], tops float32 [T, tiles], sums float32 [T, tiles]) of half-precision hidden [T, H], head [V, H].

    tops: largest logit of each WIDTH columns; sums: of exp(logit - top) over them. Tile sizes: measured on an H100.
    """
    (tokens, size), vocab = hidden.shape, head.shape[0]
    logits = torch.empty(tokens, vocab, device=hidden.device)
    tops, sums = torch.empty(2, tokens, triton.cdiv(vocab, WIDTH), device=hidden.device).unbind()
    if programs is None:
        programs = torch.cuda.get_device_properties(hidden.device).multi_processor_count
    _product[(programs,)](
        TensorDescriptor.from_tensor(hidden.contiguous(), [rows, depth]),
        TensorDescriptor.from_tensor(head.contiguous(), [WIDTH, depth]),
        logits, tops, sums, tokens, vocab, size, rows, WIDTH, depth, band, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return logits, tops, sums


def token_statistics(logits, tops, sums, targets, entropy_topk, *, num_warps=8):
    """(nll, entropy), each float32 [T], from what ``product`` returned; for at least K tiles, K <= 32."""
    tokens, vocab = logits.shape
    tiles = tops.shape[1]
    nll, entropy = logits.new_empty(2, tokens).unbind()
    _statistics_of_tiles[(tokens,)](
        logits, tops, sums, targets.contiguous(), nll, entropy, vocab, tiles, 1 / math.log(entropy_topk), entropy_topk,
        triton.next_power_of_2(tiles), WIDTH, num_warps=num_warps,
    )  # fmt: skip
    return nll, entropy
