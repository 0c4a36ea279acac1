"""MXFP4 (OCP Microscaling): 32 four-bit floats (E2M1) share one power-of-two scale (E8M0).

Layout as in gpt-oss checkpoints: ``blocks`` uint8 [..., G, 16] holds 32 values a group, the even one of each pair in
the low nibble; ``scales`` uint8 [..., G] holds the exponent plus 127.
"""

import itertools

import torch

from ..errors import CheckpointError
from ..kernels.mxfp4 import E2M1, SCALE_BIAS

GROUP = 32
LARGEST_SCALE = 252  # 6 x 2^125; what the next one may stand for exceeds float32 and bfloat16, and 255 is NaN
_E2M1_MAX_EXPONENT = 2  # 6 = 1.5 * 2^2


def is_part(name: str) -> bool:
    """Whether a tensor of this name holds blocks or scales, and no numbers of its own."""
    return name.endswith(("_blocks", "_scales"))


def is_scale(name: str) -> bool:
    """Whether a tensor of this name holds scales."""
    return name.endswith("_scales")


def require_fit(blocks: torch.Tensor, scales: torch.Tensor) -> None:
    """Raises CheckpointError unless blocks and scales belong together."""
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8 or blocks.shape != (*scales.shape, GROUP // 2):
        raise CheckpointError(
            f"MXFP4 blocks {tuple(blocks.shape)} {blocks.dtype} do not fit scales {tuple(scales.shape)} {scales.dtype}: "
            f"expected uint8 [..., G, {GROUP // 2}] and uint8 [..., G]. The checkpoint is damaged; fetch it again."
        )


def encode(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks and scales nearest to ``values`` [..., G * 32], each group's scale chosen for the least squared error.

    The candidates are the exponent that keeps the group's largest magnitude below 8 (it may saturate at 6) and the
    next one up; values round to the nearest E2M1 number, halves to the even code.
    """
    groups = values.float().unflatten(-1, (-1, GROUP))
    peak = groups.abs().amax(-1, keepdim=True)
    low = torch.floor(torch.log2(peak.clamp(min=2.0**-100))) - _E2M1_MAX_EXPONENT
    candidates = [(_nearest_codes(torch.ldexp(groups, -e)), e) for e in (low, low + 1)]
    magnitudes = torch.tensor(E2M1, device=values.device)
    errors = [
        (torch.ldexp(magnitudes[c.int()], e) - groups.abs()).square().sum(-1, keepdim=True) for c, e in candidates
    ]
    (codes_low, _), (codes_high, high) = candidates
    use_high = errors[1] < errors[0]
    codes = torch.where(use_high, codes_high, codes_low)
    codes = codes + 8 * (groups.signbit() & (codes > 0))
    scales = torch.where(use_high, high, low).squeeze(-1) + SCALE_BIAS
    blocks = codes[..., ::2] | (codes[..., 1::2] << 4)
    return blocks.to(torch.uint8), scales.to(torch.uint8)


def _nearest_codes(scaled: torch.Tensor) -> torch.Tensor:
    """E2M1 codes 0..7 nearest to |scaled|: how many midpoints lie below it; on a midpoint the even code is taken."""
    magnitude = scaled.abs()
    codes = torch.zeros_like(magnitude, dtype=torch.uint8)
    for code, (low, high) in enumerate(itertools.pairwise(E2M1)):
        midpoint = (low + high) / 2
        codes += magnitude > midpoint if code % 2 == 0 else magnitude >= midpoint
    return codes
