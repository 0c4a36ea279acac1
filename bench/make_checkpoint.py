"""Write a checkpoint of gpt-oss-20b's or 120b's exact shape and layout with random weights.

    python bench/make_checkpoint.py OUT [--model 20b|120b] [--layers N]

Real weights are 13.8 GB to download; speed and memory do not depend on their values. Scales are drawn so that activations
stay in the range of the real model.
"""

import argparse
import json
import shutil
from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GptOssConfig

from eaftlib.model.families import FAMILIES

SHAPES = {
    "20b": {"num_hidden_layers": 24, "num_local_experts": 32},
    "120b": {"num_hidden_layers": 36, "num_local_experts": 128},
}
TOKENIZER = Path(__file__).parents[1] / "demo" / "model"  # any tokenizer whose ids lie below the vocabulary size


def random_tensor(name: str, shape: list[int], generator: torch.Generator) -> torch.Tensor:
    if name.endswith(("_blocks", "_scales")):
        low, high = (0, 256) if name.endswith("_blocks") else (118, 121)
        return torch.randint(low, high, shape, generator=generator, device=generator.device, dtype=torch.uint8)
    if "norm" in name:
        return torch.ones(shape).bfloat16()
    std = 1.0 if name.endswith("sinks") else 0.02
    return (torch.randn(shape, generator=generator, device=generator.device) * std).bfloat16()


def write_checkpoint(out: Path, model: str, layers: int | None = None) -> None:
    config = GptOssConfig(**SHAPES[model])
    config.num_hidden_layers = layers or config.num_hidden_layers
    config.layer_types = config.layer_types[: config.num_hidden_layers]
    out.mkdir(parents=True)
    generator = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(0)
    family, shards = FAMILIES[config.model_type], defaultdict(dict)
    for name, shape in family.shapes(config, ()).items():  # nothing is stored yet, so MXFP4
        layer = next((i for i in range(config.num_hidden_layers) if name.startswith(family.prefix(i))), -1)
        shards[layer + 1][name] = shape
    weight_map, total = {}, 0
    for i, shapes in sorted(shards.items()):
        tensors = {name: random_tensor(name, shape, generator) for name, shape in shapes.items()}
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", choices=SHAPES, default="20b")
    parser.add_argument("--layers", type=int, help="fewer layers than the real model")
    args = parser.parse_args()
    write_checkpoint(args.out, args.model, args.layers)


if __name__ == "__main__":
    main()
