"""What the rest of the library asks about an architecture."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig

if TYPE_CHECKING:
    from pydantic import BaseModel

Fetch = Callable[[str], torch.Tensor]  # a stored tensor by its full name, on the device where it is wanted
Decode = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # MXFP4 blocks and scales to values, as they are used
Cast = Callable[[str, torch.Tensor], torch.Tensor]  # a layer's parameter by its name in the layer, as it is used


class Family(ABC):
    """Names, shapes and modules of one architecture. Tensor names are those of its published checkpoints.

    model_types: each ``model_type`` of a config.json, and whose checkpoints have it. experts_key, top_k_key: what the
    configuration calls the number of experts in a layer and the number that a token is sent to.
    """

    model_types: ClassVar[Mapping[str, str]]
    config_class: type[PreTrainedConfig]
    experts_key: str
    top_k_key: str
    embedding = "model.embed_tokens.weight"
    final_norm = "model.norm.weight"
    lm_head = "lm_head.weight"

    @abstractmethod
    def settings(self) -> type["BaseModel"]:
        """The fields of config.json that a number depends on, their types and ranges."""

    @abstractmethod
    def prefix(self, layer: int) -> str:
        """What the names of a layer's tensors begin with."""

    @abstractmethod
    def moe_layers(self, config: PreTrainedConfig) -> Sequence[int]:
        """Layers that have experts, ascending."""

    @abstractmethod
    def shapes(self, config: PreTrainedConfig, stored: Collection[str]) -> dict[str, list[int]]:
        """Every tensor that a checkpoint must have, in the number format that ``stored`` names show it has."""

    @abstractmethod
    def layer_of_experts(self, name: str) -> int | None:
        """The layer whose experts dim 0 of this tensor counts (router and experts); None for all other tensors."""

    @abstractmethod
    def part_of(self, name: str) -> str | None:
        """``routers``, ``expert_biases``, ``norms``, ``attention`` or ``lm_head``; None for embedding and expert matrices."""

    @abstractmethod
    def build_layer(self, config: PreTrainedConfig, index: int) -> nn.Module:
        """transformers' decoder layer without weights; its forward takes what ``layer_inputs`` gives."""

    @abstractmethod
    def layer_state(
        self, layer: nn.Module, index: int, stored: Collection[str], fetch: Fetch, decode: Decode, cast: Cast
    ) -> dict[str, torch.Tensor]:
        """All of a layer's parameters as they are used, from tensors as they are stored."""

    @abstractmethod
    def experts(self, layer: nn.Module) -> nn.Module:
        """The module that computes a layer's experts."""

    @abstractmethod
    def router(self, layer: nn.Module) -> nn.Module:
        """The module that routes a layer's tokens; what it returns begins with the logits [T, E] that choose experts."""

    @abstractmethod
    def build_final_norm(self, config: PreTrainedConfig) -> nn.Module: ...

    @abstractmethod
    def build_rotary(self, config: PreTrainedConfig) -> nn.Module:
        """(hidden states, positions [1, S]) -> (cos, sin) of the layers' position embedding."""

    @abstractmethod
    def masked_routing(self, keep: torch.Tensor, parameter: Fetch) -> dict[str, torch.Tensor]:
        """Parameters of a layer with which it sends no token to an expert where ``keep`` bool [E] is false.

        parameter: the layer's own, by name; so that trained values are masked as well, and gradients reach them.
        """

    @abstractmethod
    def completion_spans(self, text: str) -> list[tuple[int, int]]:
        """Character ranges of the completions in a conversation of its chat format, ascending and disjoint."""
