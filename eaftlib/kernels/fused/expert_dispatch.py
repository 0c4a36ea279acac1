"""Hidden states in the order of experts, each read once however often it is written."""

import triton
import triton.language as tl


@triton.jit
def _dispatch(hidden, row_of_pair, rows, size, top_k, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(hidden + token * size + column, mask=column < size)
    for k in range(top_k):
        row = tl.load(row_of_pair + token * top_k + k).to(tl.int64)
        tl.store(rows + row * size + column, x, mask=column < size)


def dispatch(hidden, row_of_pair, *, block=1024, num_warps=4):
    """As ``kernels.expert_dispatch.dispatch``."""
    hidden, row_of_pair = hidden.contiguous(), row_of_pair.contiguous()
    tokens, top_k = row_of_pair.shape
    size = hidden.shape[1]
    rows = hidden.new_empty(tokens * top_k, size)
    grid = (tokens, triton.cdiv(size, block))
    _dispatch[grid](hidden, row_of_pair, rows, size, top_k, block, num_warps=num_warps)
    return rows
