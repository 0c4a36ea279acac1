"""Write a checkpoint of gpt-oss-20b's or 120b's exact shape and layout with random weights.

    python bench/make_checkpoint.py OUT [--model 20b|120b] [--layers N]

Real weights are 13.8 GB to download; speed and memory do not depend on their values. Scales are drawn so that activations
stay in the range of the real model.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GptOssConfig

SHAPES = {
    "20b": {"num_hidden_layers": 24, "num_local_experts": 32},
    "120b": {"num_hidden_layers": 36, "num_local_experts": 128},
}
TOKENIZER = Path(__file__).parents[1] / "demo" / "model"  # any tokenizer whose ids lie below the vocabulary size


def layer_tensors(c: GptOssConfig, index: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    h, inter, e = c.hidden_size, c.intermediate_size, c.num_local_experts
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim

    def normal(*shape, std=0.02):
        return (torch.randn(shape, generator=generator, device=generator.device) * std).bfloat16()

    tensors = {
        "input_layernorm.weight": torch.ones(h).bfloat16(),
        "post_attention_layernorm.weight": torch.ones(h).bfloat16(),
    }
    for name, size in (("q", q), ("k", kv), ("v", kv)):
        tensors |= {f"self_attn.{name}_proj.weight": normal(size, h), f"self_attn.{name}_proj.bias": normal(size)}
    tensors |= {"self_attn.o_proj.weight": normal(h, q), "self_attn.o_proj.bias": normal(h)}
    tensors |= {"self_attn.sinks": normal(c.num_attention_heads, std=1.0)}
    tensors |= {"mlp.router.weight": normal(e, h), "mlp.router.bias": normal(e)}
    for name, rows, columns in (("gate_up_proj", 2 * inter, h), ("down_proj", h, inter)):
        groups = columns // 32
        tensors[f"mlp.experts.{name}_blocks"] = torch.randint(
            256, (e, rows, groups, 16), generator=generator, device=generator.device, dtype=torch.uint8
        )
        tensors[f"mlp.experts.{name}_scales"] = torch.randint(
            118, 121, (e, rows, groups), generator=generator, device=generator.device, dtype=torch.uint8
        )
        tensors[f"mlp.experts.{name}_bias"] = normal(e, rows)
    return {f"model.layers.{index}.{name}": t for name, t in tensors.items()}


def write_checkpoint(out: Path, model: str, layers: int | None = None) -> None:
    config = GptOssConfig(**SHAPES[model])
    config.num_hidden_layers = layers or config.num_hidden_layers
    config.layer_types = config.layer_types[: config.num_hidden_layers]
    out.mkdir(parents=True)
    generator = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(0)
    weight_map, total = {}, 0
    for i in range(config.num_hidden_layers + 1):
        tensors = end_tensors(config, generator) if i == 0 else layer_tensors(config, i - 1, generator)
        file = f"model-{i + 1:05d}-of-{config.num_hidden_layers + 1:05d}.safetensors"
        save_file(tensors, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    settings = config.to_diff_dict() | {"architectures": ["GptOssForCausalLM"], "dtype": "bfloat16"}
    settings["quantization_config"] = {"quant_method": "mxfp4"}
    (out / "config.json").write_text(json.dumps(settings, indent=2))
    for file in (*TOKENIZER.glob("tokenizer*"), *TOKENIZER.glob("special*")):
        shutil.copy(file, out)
    print(f"{out}: {total:,} bytes of tensors in {config.num_hidden_layers + 1} shards")


def end_tensors(c: GptOssConfig, generator: torch.Generator) -> dict[str, torch.Tensor]:
    shape = (c.vocab_size, c.hidden_size)
    tensors = {
        f"{name}.weight": (torch.randn(shape, generator=generator, device=generator.device) * 0.02).bfloat16()
        for name in ("model.embed_tokens", "lm_head")
    }
    return tensors | {"model.norm.weight": torch.ones(c.hidden_size).bfloat16()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", choices=SHAPES, default="20b")
    parser.add_argument("--layers", type=int, help="fewer layers than the real model")
    args = parser.parse_args()
    write_checkpoint(args.out, args.model, args.layers)


if __name__ == "__main__":
    main()
