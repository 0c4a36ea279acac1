"""gpt-oss: 20b, 120b and checkpoints of their layout, experts in MXFP4 or in a floating-point type."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssDecoderLayer, GptOssRMSNorm, GptOssRotaryEmbedding

from ...text import harmony
from .. import mxfp4
from .family import Cast, Decode, Family, Fetch

if TYPE_CHECKING:
    from .gpt_oss_settings import GptOssSettings


class GptOss(Family):
    """Every layer has experts; router and experts count them in dim 0."""

    model_types: ClassVar = {"gpt_oss": "openai/gpt-oss-20b, openai/gpt-oss-120b and checkpoints of their layout"}
    config_class = GptOssConfig
    experts_key = "num_local_experts"
    top_k_key = "num_experts_per_tok"

    def settings(self) -> type["GptOssSettings"]:
        from .gpt_oss_settings import GptOssSettings

        return GptOssSettings

    def prefix(self, layer: int) -> str:
        return f"model.layers.{layer}."

    def moe_layers(self, config: GptOssConfig) -> Sequence[int]:
        return range(config.num_hidden_layers)

    def shapes(self, config: GptOssConfig, stored: Collection[str]) -> dict[str, list[int]]:
        ends = {self.embedding: [config.vocab_size, config.hidden_size], self.final_norm: [config.hidden_size]}
        if not config.tie_word_embeddings:
            ends[self.lm_head] = [config.vocab_size, config.hidden_size]
        layers = {}
        for i in range(config.num_hidden_layers):
            shapes = _attention_shapes(config) | _expert_shapes(config, self.prefix(i), stored)
            layers |= {self.prefix(i) + name: shape for name, shape in shapes.items()}
        return ends | layers

    def layer_of_experts(self, name: str) -> int | None:
        return int(name.split(".")[2]) if ".mlp.router." in name or ".mlp.experts." in name else None

    def part_of(self, name: str) -> str | None:
        if ".mlp.experts." in name:
            return "expert_biases" if name.endswith("_bias") else None
        words = {".mlp.router.": "routers", ".self_attn.": "attention", "norm.weight": "norms", "lm_head.": "lm_head"}
        return next((part for word, part in words.items() if word in name), None)

    def build_layer(self, config: GptOssConfig, index: int) -> nn.Module:
        with torch.device("meta"):
            layer = GptOssDecoderLayer(config, index)
        experts = layer.mlp.experts
        for name in (
            "limit",
            "alpha",
        ):  # transformers 5.0 has the published models' values, whatever a configuration says
            setattr(experts, name, getattr(config, f"swiglu_{name}", getattr(experts, name)))
        return layer

    def layer_state(
        self, layer: nn.Module, index: int, stored: Collection[str], fetch: Fetch, decode: Decode, cast: Cast
    ) -> dict[str, torch.Tensor]:
        state = {}
        for name in layer.state_dict():
            full = self.prefix(index) + name
            if full + "_blocks" in stored:
                # Stored as [E, out, in]; transformers multiplies x @ W with W [E, in, out].
                packed = fetch(full + "_blocks"), fetch(full + "_scales")
                mxfp4.require_fit(*packed)
                state[name] = decode(*packed).transpose(1, 2)
            else:
                state[name] = cast(name, fetch(full))
        return state

    def experts(self, layer: nn.Module) -> nn.Module:
        return layer.mlp.experts

    def router(self, layer: nn.Module) -> nn.Module:
        return layer.mlp.router

    def build_final_norm(self, config: GptOssConfig) -> nn.Module:
        return GptOssRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def build_rotary(self, config: GptOssConfig) -> nn.Module:
        return GptOssRotaryEmbedding(config)

    def masked_routing(self, keep: torch.Tensor, parameter: Fetch) -> dict[str, torch.Tensor]:
        """Nothing is added to gpt-oss's router logits after its bias, so a bias of minus infinity removes an expert."""
        name = "mlp.router.bias"
        return {name: parameter(name).masked_fill(~keep, float("-inf"))}

    def completion_spans(self, text: str) -> list[tuple[int, int]]:
        return harmony.completion_spans(text)


def _attention_shapes(c: GptOssConfig) -> dict[str, list[int]]:
    """Attention and the two norms of a layer."""
    h, q, kv = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    shapes = {"input_layernorm.weight": [h], "post_attention_layernorm.weight": [h]}
    for name, size in (("q", q), ("k", kv), ("v", kv)):
        shapes |= {f"self_attn.{name}_proj.weight": [size, h], f"self_attn.{name}_proj.bias": [size]}
    shapes |= {"self_attn.o_proj.weight": [h, q], "self_attn.o_proj.bias": [h]}
    return shapes | {"self_attn.sinks": [c.num_attention_heads]}


def _expert_shapes(c: GptOssConfig, prefix: str, stored: Collection[str]) -> dict[str, list[int]]:
    """Router and experts of a layer; MXFP4 unless the plain matrices are stored."""
    h, inter, e = c.hidden_size, c.intermediate_size, c.num_local_experts
    shapes = {"mlp.router.weight": [e, h], "mlp.router.bias": [e]}
    for name, rows, columns in (("gate_up_proj", 2 * inter, h), ("down_proj", h, inter)):
        shapes[f"mlp.experts.{name}_bias"] = [e, rows]
        if f"{prefix}mlp.experts.{name}" in stored:
            shapes[f"mlp.experts.{name}"] = [e, columns, rows]
        else:
            groups = columns // mxfp4.GROUP
            shapes[f"mlp.experts.{name}_blocks"] = [e, rows, groups, mxfp4.GROUP // 2]
            shapes[f"mlp.experts.{name}_scales"] = [e, rows, groups]
    return shapes
