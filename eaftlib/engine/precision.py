"""In which floating-point types a model is run."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..errors import ParameterError

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """Types of a pass, and why these.

    products: weights and operands of matrix products. residual: hidden states between layers. head: operands of the
    LM head's product. Logits, everything computed from them, softmax and the inside of norms are float32 in all cases.
    """

    products: torch.dtype
    residual: torch.dtype
    head: torch.dtype
    reason: str = ""

    @property
    def name(self) -> str:
        """As the parameter ``dtype`` spells it."""
        return str(self.products).removeprefix("torch.")


def resolve(dtype: str, devices: Iterable[torch.device]) -> Precision:
    """``auto``: bfloat16 where every device computes it, else float32. Raises ParameterError for an unknown type."""
    devices, reason = list(devices), ""
    on_cpu = devices[0].type == "cpu"
    if dtype == "auto":
        if on_cpu:
            dtype, why = "float32", "a CPU is exact in it at little cost"
        elif min(map(torch.cuda.get_device_capability, devices)) >= (8, 0):
            dtype, why = "bfloat16", "the type the model was published in"
        else:
            dtype, why = "float32", "this GPU lacks bfloat16, and float16 overflows on gpt-oss"
        reason = f"{dtype}: {why}"
    if dtype not in TYPES:
        raise ParameterError(f"dtype: found {dtype!r}, expected 'auto' or one of {sorted(TYPES)}")
    products = TYPES[dtype]
    # A CPU has no product of half-precision operands into float32 logits.
    return Precision(products, residual=products, head=torch.float32 if on_cpu else products, reason=reason)
