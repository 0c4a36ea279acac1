"""Models that differ from a checkpoint's in which experts may be chosen, and in some small parameters."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from ..errors import ParameterError
from .weights import Weights


class Variant:
    """A keep-set and changed parameters, put on the layers for one call at a time: afterwards they are as they were.

    changed: full tensor name -> value, which may require gradients; it is used in the type of the weights' products. Any
    stored parameter of a layer may change, and the final norm; ParameterError for all other names and shapes.
    """

    def __init__(self, weights: Weights, keep: np.ndarray | None = None, changed: Mapping[str, torch.Tensor] = {}):
        """keep: bool [num_layers, num_experts], false where no token may be routed; None: the whole model."""
        self._family, self._dtype = weights.family, weights.precision.products
        self._moe = frozenset(weights.family.moe_layers(weights.checkpoint.config))
        self._keep = None if keep is None else torch.from_numpy(keep).to(weights.device)
        self._changed = dict(changed)
        prefixes = tuple(self._family.prefix(i) for i in range(weights.checkpoint.num_layers))
        for name, value in self._changed.items():  # a name that nothing reads would leave the model as it was
            served = name == self._family.final_norm or name.startswith(prefixes)
            if not served or name not in weights.checkpoint.names:
                raise ParameterError(
                    f"changed: {name!r} is no stored parameter of a layer, nor {self._family.final_norm!r}. Give tensors by "
                    f"the names of {weights.checkpoint.model_id}."
                )
            if list(value.shape) != (shape := weights.checkpoint.shape(name)):
                raise ParameterError(f"changed: {name!r} has shape {list(value.shape)}, expected {shape}")

    def trained(self, prefix: str) -> list[torch.Tensor]:
        """Changed parameters whose names begin with ``prefix`` and that require gradients."""
        return [value for name, value in self._changed.items() if name.startswith(prefix) and value.requires_grad]

    def run(self, index: int, layer: nn.Module, hidden: torch.Tensor, **inputs) -> torch.Tensor:
        """What decoder layer ``index`` of this model makes of hidden [B, S, H]."""
        own = self._below(self._family.prefix(index))
        if self._keep is not None and index in self._moe:
            own |= self._family.masked_routing(
                self._keep[index], lambda name: own[name] if name in own else layer.get_parameter(name)
            )
        return functional_call(layer, own, (hidden,), inputs, tie_weights=False) if own else layer(hidden, **inputs)

    def norm(self, norm: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [B, S, H] after this model's final norm."""
        own = self._below(self._family.final_norm.removesuffix("weight"))
        return functional_call(norm, own, (hidden,)) if own else norm(hidden)

    def _below(self, prefix: str) -> dict[str, torch.Tensor]:
        return {n.removeprefix(prefix): v.to(self._dtype) for n, v in self._changed.items() if n.startswith(prefix)}
