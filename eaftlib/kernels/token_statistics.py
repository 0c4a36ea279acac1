"""Per-token statistics of the next-token distribution, without ever holding all logits."""

import math

import torch

# Logits held at once: few enough to stay in a CPU's cache, enough to feed a GPU's matrix units.
SLICE_BYTES = {"cpu": 8 << 20, "cuda": 1600 << 20}


def slice_rows(vocab_size: int, device: torch.device) -> int:
    """How many tokens' float32 logits make one slice: never above 1/24 of the GPU memory that this process may take."""
    room = SLICE_BYTES[device.type]
    if device.type == "cuda":
        share = torch.cuda.get_per_process_memory_fraction(device)
        room = min(room, int(share * torch.cuda.get_device_properties(device).total_memory) // 24)
    return max(1, room // (4 * vocab_size))


def logits_of(hidden: torch.Tensor, lm_head: torch.Tensor) -> torch.Tensor:
    """float32 logits [T, V] of hidden [T, H] and lm_head [V, H]; on a GPU half-precision products accumulate into float32.

    hidden is taken in the head's type: where float16 cannot hold it, logits are not finite.
    """
    if hidden.is_cuda and lm_head.dtype != torch.float32:
        return torch.mm(hidden.to(lm_head.dtype), lm_head.T, out_dtype=torch.float32)
    return hidden.float() @ lm_head.T


def token_statistics(
    logits: torch.Tensor, targets: torch.Tensor, entropy_topk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(nll [T], entropy [T]) float32 from logits [T, V] float32 and targets [T] int64.

    nll = logsumexp(z) - z[target]. entropy: of the softmax over the top K logits renormalised among themselves,
    divided by ln K, in [0, 1]; NaN logits give NaN.
    """
    nll = torch.logsumexp(logits, dim=-1) - logits.gather(-1, targets[:, None]).squeeze(-1)
    return nll, topk_entropy(top_logits(logits, entropy_topk))


def topk_entropy(top: torch.Tensor) -> torch.Tensor:
    """Entropy over ln K of the softmax of ``top`` [T, K]."""
    shifted = top - top[:, :1]
    weights = shifted.exp()
    total = weights.sum(-1)
    entropy = total.log() - (weights * shifted).sum(-1) / total
    return (entropy / math.log(top.shape[-1])).clamp(0.0, 1.0)


def top_logits(logits: torch.Tensor, k: int, group: int = 64) -> torch.Tensor:
    """The k largest logits [T, k], descending.

    The k largest values lie in the k groups with the largest maxima, so only those groups are searched: one read of the
    logits and a small top-k, several times faster than torch.topk over the vocabulary.
    """
    tokens, vocab = logits.shape
    if vocab % group or vocab // group <= k:
        return logits.topk(k, dim=-1).values
    grouped = logits.view(tokens, vocab // group, group)
    groups = grouped.amax(-1).topk(k, dim=-1).indices
    candidates = grouped.gather(1, groups[..., None].expand(-1, -1, group))
    return candidates.flatten(1).topk(k, dim=-1).values
