"""In which floating-point types a model is run."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..errors import ParameterError

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """Types of a pass, and why these.

    products: operands of the large matrix products. residual: hidden states between layers, and the parameters that are no
    such operand: norms, routers, biases, sinks. head: operands of the LM head's product. Logits, everything computed from
    them, softmax and the inside of norms are float32 in all cases.
    """

    products: torch.dtype
    residual: torch.dtype
    head: torch.dtype
    reason: str = ""

    @property
    def is_half(self) -> bool:
        """Whether operands are float16, which holds little, so that everything else is float32."""
        return self.products == torch.float16

    @property
    def name(self) -> str:
        """As the parameter ``dtype`` spells it."""
        return str(self.products).removeprefix("torch.")


def resolve(dtype: str, devices: Iterable[torch.device], training: bool = False) -> Precision:
    """``auto``: on GPUs bfloat16 where every one computes it, else float16 products where every one has tensor cores.

    On a CPU, on older GPUs, and where float16 would have to be trained, float32. Raises ParameterError for an unknown type.
    """
    devices, reason = list(devices), ""
    on_cpu = devices[0].type == "cpu"
    if dtype == "auto":
        if on_cpu:
            dtype, why = "float32", "a CPU is exact in it at little cost"
        elif (least := min(map(torch.cuda.get_device_capability, devices))) >= (8, 0):
            dtype, why = "bfloat16", "the type the model was published in"
        elif least >= (7, 0) and not training:
            dtype, why = "float16", "operands of products; this GPU lacks bfloat16; sums and all else in float32"
        else:
            dtype, why = (
                "float32",
                "this GPU lacks bfloat16" + (", float16 gradients" if training else " and tensor cores"),
            )
        reason = f"{dtype}: {why}"
    if dtype not in TYPES:
        raise ParameterError(f"dtype: found {dtype!r}, expected 'auto' or one of {sorted(TYPES)}")
    products = TYPES[dtype]
    residual = torch.float32 if products == torch.float16 else products
    # A CPU has no product of half-precision operands into float32 logits.
    return Precision(products, residual, head=torch.float32 if on_cpu else products, reason=reason)
