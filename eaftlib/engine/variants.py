"""Models that differ from a checkpoint's in which experts may be chosen, and in some small parameters."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from ..errors import ParameterError
from .weights import Weights


class Changed:
    """A parameter's value in place of the stored one. shape: the stored one's; leaves: the tensors it is computed from."""

    def __init__(self, tensor: torch.Tensor):
        self.shape, self.leaves = list(tensor.shape), [tensor]

    def value(self, stored: torch.Tensor) -> torch.Tensor:
        """stored: the checkpoint's own, in the type of the weights' products."""
        return self.leaves[0]


class Variant:
    """A keep-set and changed parameters, put on the layers for one call at a time: afterwards they are as they were.

    changed: full tensor name -> value, a tensor or how it is computed; its leaves may require gradients, and it is used in
    the type of the weights' products. Any stored parameter of a layer may change, the final norm and the LM head (unless
    it is tied to the embedding); ParameterError for all other names and shapes.
    """

    def __init__(
        self, weights: Weights, keep: np.ndarray | None = None, changed: Mapping[str, torch.Tensor | Changed] = {}
    ):
        """keep: bool [num_layers, num_experts], false where no token may be routed; None: the whole model."""
        self._weights, self._family = weights, weights.family
        self._moe = frozenset(weights.family.moe_layers(weights.checkpoint.config))
        self._keep = None if keep is None else torch.from_numpy(keep).to(weights.device)
        self._changed = {n: Changed(v) if isinstance(v, torch.Tensor) else v for n, v in changed.items()}
        prefixes = tuple(self._family.prefix(i) for i in range(weights.checkpoint.num_layers))
        ends = (self._family.final_norm, self._family.lm_head)
        for name, value in self._changed.items():  # a name that nothing reads would leave the model as it was
            if not name.startswith((*prefixes, *ends)) or name not in weights.checkpoint.names:
                raise ParameterError(
                    f"changed: {name!r} is no stored parameter of a layer, nor one of {ends}. Give tensors by the names of "
                    f"{weights.checkpoint.model_id}."
                )
            if value.shape != (shape := weights.checkpoint.shape(name)):
                raise ParameterError(f"changed: {name!r} has shape {value.shape}, expected {shape}")

    def trained(self, *prefixes: str) -> list[torch.Tensor]:
        """Leaves, of changed parameters whose names begin with one of ``prefixes``, that require gradients."""
        chosen = (value for name, value in self._changed.items() if name.startswith(prefixes))
        return [leaf for value in chosen for leaf in value.leaves if leaf.requires_grad]

    def run(self, index: int, layer: nn.Module, hidden: torch.Tensor, **inputs) -> torch.Tensor:
        """What decoder layer ``index`` of this model makes of hidden [B, S, H]."""
        own = self._below(self._family.prefix(index), layer)
        if self._keep is not None and index in self._moe:
            own |= self._family.masked_routing(
                self._keep[index], lambda name: own[name] if name in own else layer.get_parameter(name)
            )
        return functional_call(layer, own, (hidden,), inputs, tie_weights=False) if own else layer(hidden, **inputs)

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [B, S, H] after this model's final norm."""
        norm = self._weights.norm
        own = self._below(self._family.final_norm.removesuffix("weight"), norm)
        return functional_call(norm, own, (hidden,)) if own else norm(hidden)

    @property
    def lm_head(self) -> torch.Tensor:
        """[V, H], in the type of the head's product."""
        stored, changed = self._weights.lm_head, self._changed.get(self._family.lm_head)
        return stored if changed is None else changed.value(stored).to(stored.dtype)

    def _below(self, prefix: str, module: nn.Module) -> dict[str, torch.Tensor]:
        own = {name.removeprefix(prefix): value for name, value in self._changed.items() if name.startswith(prefix)}
        stored = {name: module.get_parameter(name) for name in own}
        return {name: value.value(stored[name]).to(stored[name].dtype) for name, value in own.items()}
