"""Products of float16 operands, for GPUs that have no bfloat16; their results and all between products are float32.

Float16 ends at 65,504. gpt-oss's residual passes that near the last layer, and so can one expert's output: neither is ever
an operand. What is one, normalised hidden states, heads and activations, is looked at when it is narrowed; where a value
does not fit, the layer is computed again with that operand in float32, and so from then on.
"""

import warnings

import torch
from torch import nn

HALF = torch.float16
_EXACT_SCALES = 127 - 12, 127 + 13  # largest MXFP4 scale of an expert: at least, at most


class Narrowing:
    """One layer's operands: by name, what does not fit into float16. Outlives the layer, which may be read again."""

    def __init__(self, layer: int):
        self.layer = layer
        self.wide: set[str] = set()
        self._overflowed: dict[str, torch.Tensor] = {}

    def narrow(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """x as an operand: in float16, or as it is where it did not fit before."""
        if name in self.wide:
            return x
        narrow = x.to(HALF)
        self._overflowed[name] = torch.isinf(narrow).any()
        return narrow

    def guard(self, layer: nn.Module) -> None:
        """Have the layer compute again what an overflow has spoilt."""
        layer.register_forward_hook(self._again, with_kwargs=True)

    def _again(self, layer: nn.Module, args, kwargs, output: torch.Tensor) -> torch.Tensor:
        while name := self._first_overflow():
            self.wide.add(name)
            warnings.warn(f"layer {self.layer}: {name} exceed float16; computed in float32 from now on", stacklevel=2)
            output = layer.forward(*args, **kwargs)
        return output

    def _first_overflow(self) -> str | None:
        """Of the operands narrowed since the last call; later ones may be infinite only because this one was."""
        names = list(self._overflowed)
        bad = torch.stack(list(self._overflowed.values())).tolist() if names else []
        self._overflowed.clear()
        return next((name for name, is_bad in zip(names, bad, strict=True) if is_bad), None)


def multiply(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """float32 x [N, K] @ weight [K, M]: of float16 operands where both are, else of float32 ones.

    A CPU has no such product of half precision; it multiplies the same rounded operands in float32.
    """
    if x.is_cuda and x.dtype == weight.dtype == HALF:
        return torch.mm(x, weight, out_dtype=torch.float32) if out is None else _mm_into(x, weight, out)
    return torch.mm(x.float(), weight.float(), out=out)


def _mm_into(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.mm.dtype_out(x, weight, torch.float32, out=out)


def narrowed_weight(stored: torch.Tensor) -> torch.Tensor:
    """In float16 where that holds it: finite, relative error at most 2^-11, as of any number there; else in float32."""
    half, exact = stored.to(HALF), stored.float()
    error = torch.linalg.vector_norm(half.float() - exact)
    return half if error <= 2**-11 * torch.linalg.vector_norm(exact) else exact  # NaN and Inf are not below


def fits_half(scales: torch.Tensor) -> bool:
    """Whether float16 holds MXFP4 values with these scales [E, ...]: 6 x 2^13 is its largest, 2^-24 its step at zero.

    Where an expert's largest scale is 2^-12 or more, what falls below that step is less than 2^-11 of its large values.
    """
    low, high = _EXACT_SCALES
    largest = scales.flatten(1).amax(1)
    return bool(((largest >= low) & (largest <= high)).all())
