"""What gpt-oss's config.json must say: fields without which transformers would go on with a default of its own."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1, lt=2**31)]
Positive = Annotated[float, Field(gt=0, lt=1e9)]
Type = Literal["bfloat16", "float16", "float32"] | None


class Yarn(BaseModel):
    """Position embedding, as in all published checkpoints. For each of these but the last two transformers has a default."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    rope_type: Literal["yarn"]
    factor: Annotated[float, Field(ge=1, lt=1e9)]
    beta_fast: Positive
    beta_slow: Positive
    truncate: bool
    original_max_position_embeddings: Count
    rope_theta: Positive = 0.0  # not here: then beside it
    attention_factor: Positive | None = None
    mscale: Positive | None = None
    mscale_all_dim: Positive | None = None


class GptOssSettings(BaseModel):
    """Fields that only training, generation or loading elsewhere reads are left alone."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    num_hidden_layers: Annotated[int, Field(ge=1, le=1000)]
    num_local_experts: Count
    num_experts_per_tok: Count
    hidden_size: Count
    intermediate_size: Count
    vocab_size: Count
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Count
    sliding_window: Count
    layer_types: list[Literal["sliding_attention", "full_attention"]]
    max_position_embeddings: Count
    rms_norm_eps: Annotated[float, Field(gt=0, lt=1)]
    rope_theta: Positive | None = None
    rope_parameters: Yarn | None = None
    rope_scaling: Yarn | None = None  # as it was called before transformers 5
    tie_word_embeddings: bool = False
    attention_bias: Literal[True] = True  # every published checkpoint has them, and what is read here wants them
    hidden_act: Literal["silu"] = "silu"
    swiglu_limit: Positive = 7.0
    swiglu_alpha: Positive = 1.702
    dtype: Type = None
    torch_dtype: Type = None

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.num_experts_per_tok > self.num_local_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} of num_local_experts {self.num_local_experts}"
            )
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries, num_hidden_layers is {self.num_hidden_layers}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        ropes = [rope for rope in (self.rope_parameters, self.rope_scaling) if rope is not None]
        if len(ropes) != 1:
            raise ValueError(f"found {len(ropes)} of rope_parameters and rope_scaling, expected one")
        if not (ropes[0].rope_theta or self.rope_theta):
            raise ValueError("there is no rope_theta")
        return self
