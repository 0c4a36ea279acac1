"""How far another model's next-token distribution is from the whole model's, in a single read of both logits."""

import torch
import triton
import triton.language as tl

_LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _divergence(base, other, kl, same, vocab, LANES: tl.constexpr):
    row = tl.program_id(0)
    p = base + row.to(tl.int64) * vocab
    q = other + row.to(tl.int64) * vocab
    lane = tl.arange(0, LANES)
    p_max = tl.full([LANES], _LOWEST, tl.float32)
    q_max = tl.full([LANES], _LOWEST, tl.float32)
    p_sum = tl.zeros([LANES], tl.float32)
    q_sum = tl.zeros([LANES], tl.float32)
    gap = tl.zeros([LANES], tl.float32)  # sum of exp(p - p_max) (p - q)
    p_at = tl.zeros([LANES], tl.int32)
    q_at = tl.zeros([LANES], tl.int32)
    for start in range(0, vocab, LANES):
        inside = start + lane < vocab
        x = tl.load(p + start + lane, mask=inside, other=_LOWEST)
        y = tl.load(q + start + lane, mask=inside, other=_LOWEST)
        rise = x - p_max
        shrink = tl.exp(-tl.abs(rise))
        p_sum = tl.where(rise > 0, p_sum * shrink + 1.0, p_sum + shrink)
        gap = tl.where(rise > 0, gap * shrink + (x - y), gap + shrink * (x - y))
        p_at = tl.where(rise > 0, start, p_at)
        p_max = tl.maximum(p_max, x)
        rise = y - q_max
        shrink = tl.exp(-tl.abs(rise))
        q_sum = tl.where(rise > 0, q_sum * shrink + 1.0, q_sum + shrink)
        q_at = tl.where(rise > 0, start, q_at)
        q_max = tl.maximum(q_max, y)
    p_top = tl.max(p_max, axis=0)
    q_top = tl.max(q_max, axis=0)
    scale = tl.exp(p_max - p_top)
    p_total = tl.sum(p_sum * scale, axis=0)
    q_total = tl.sum(q_sum * tl.exp(q_max - q_top), axis=0)
    mean_gap = tl.sum(gap * scale, axis=0) / p_total
    divergence = mean_gap - (p_top - q_top) - (tl.log(p_total) - tl.log(q_total))
    tl.store(kl + row, tl.where(divergence < 0, 0.0, divergence))
    first_p = tl.min(tl.where(p_max == p_top, p_at + lane, vocab), axis=0)
    first_q = tl.min(tl.where(q_max == q_top, q_at + lane, vocab), axis=0)
    tl.store(same + row, first_p == first_q)


class Reference:
    """As ``kernels.divergence.Reference``."""

    def __init__(self, logits: torch.Tensor):
        self.logits = logits

    def compare(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return divergence(self.logits, logits)


def divergence(base, other, *, lanes=1024, num_warps=8):
    """(KL(base, other) float32 [T] in nats, same arg-max bool [T]) of float32 logits [T, V].

    Equal largest logits count as the one of lowest id, as torch.argmax does.
    """
    base, other = base.contiguous(), other.contiguous()
    rows, vocab = base.shape
    lanes = min(lanes, triton.next_power_of_2(vocab))
    kl = base.new_empty(rows)
    same = torch.empty(rows, dtype=torch.bool, device=base.device)
    _divergence[(rows,)](base, other, kl, same, vocab, lanes, num_warps=num_warps)
    return kl, same
