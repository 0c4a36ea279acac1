"""Train the demo model on one GPU and write it in the on-disk layout of openai/gpt-oss-20b.

    python demo/train.py train.npz demo/model        # four minutes on one H200; demo/README.md has the whole recipe

Every step runs the forward pass with the weights as they will be stored: bfloat16, and from ``QUANTIZE_FROM`` of the
steps on, MXFP4 for the expert matrices. Gradients go to float32 master copies (straight-through estimator), so the
model that was trained is, bit for bit, the checkpoint that is written: quantisation costs nothing afterwards.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.moe import ExpertsInterface
from transformers.models.gpt_oss.modeling_gpt_oss import load_balancing_loss_func

from eaftlib.engine import attention
from eaftlib.kernels.mxfp4 import decode
from eaftlib.model.mxfp4 import encode

SEQ_LEN = 2048
QUANTIZE_FROM = 0.6
PROMPT_WEIGHT = 0.1  # user, system and tool text: worth a little, so that capacity goes to what is evaluated
BALANCE_COEFFICIENT = 0.01
SHARD_BYTES = 3 << 20
MATRICES = ("gate_up_proj", "down_proj")


def config() -> GptOssConfig:
    return GptOssConfig(
        num_hidden_layers=6,
        num_local_experts=32,
        num_experts_per_tok=4,
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=128,
        head_dim=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=128,
        initializer_range=0.05,
    )


def load_rows(path: Path, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and loss weights of the whole training text, one long stream each."""
    data = np.load(path)
    tokens = torch.from_numpy(data["tokens"].astype(np.int16)).to(device)
    kept = torch.from_numpy(np.unpackbits(data["kept"], count=len(tokens)).astype(bool)).to(device)
    return tokens, torch.where(kept, 1.0, PROMPT_WEIGHT)


def batches(tokens, weights, batch_size: int, seed: int):
    """Endless batches of blocks; every epoch cuts the stream at another offset and shuffles the blocks."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(SEQ_LEN, (1,), generator=generator))
        count = (len(tokens) - offset) // SEQ_LEN
        order = torch.randperm(count, generator=generator).to(tokens.device)
        ids = tokens[offset : offset + count * SEQ_LEN].view(count, SEQ_LEN)
        w = weights[offset : offset + count * SEQ_LEN].view(count, SEQ_LEN)
        for rows in order.split(batch_size)[: count // batch_size]:
            yield ids[rows].long(), w[rows]


def grouped_product(rows: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    if rows.is_cuda:
        return F.grouped_mm(rows, matrices, offs=ends)
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.cat([part @ matrix for part, matrix in zip(rows.split(counts), matrices, strict=True)])


def experts_forward(self, hidden_states, top_k_index, top_k_weights):
    """transformers' grouped_mm experts with cheap gradients: no gather that reads a row twice, biases by a product.

    The backward pass of an indexed read with repeated rows took nine tenths of a step; permutations and one-hot
    products have none.
    """
    top_k = top_k_index.shape[1]
    expert, order = top_k_index.flatten().sort()
    member = F.one_hot(expert, self.num_experts).to(hidden_states.dtype)
    ends = member.sum(0, dtype=torch.float32).cumsum(0).to(torch.int32)
    rows = hidden_states.repeat_interleave(top_k, dim=0).index_select(0, order)
    gate_up = grouped_product(rows, self.gate_up_proj, ends) + member @ self.gate_up_proj_bias
    output = grouped_product(self._apply_gate(gate_up), self.down_proj, ends) + member @ self.down_proj_bias
    output = output.index_select(0, order.argsort()).view(*top_k_index.shape, -1)
    return (output * top_k_weights[..., None]).sum(1)


class StoredWeights:
    """float32 masters behind a bfloat16 model whose weights are always what a checkpoint would hold."""

    def __init__(self, model: torch.nn.Module):
        self.stored = dict(model.named_parameters())
        self.masters = {name: p.detach().float().clone().requires_grad_() for name, p in self.stored.items()}
        self.matrices = [n for n in self.stored if n.endswith(MATRICES)]

    @torch.no_grad()
    def store(self, quantize: bool) -> None:
        for name, stored in self.stored.items():
            stored.copy_(self.masters[name].bfloat16())
        for kind in MATRICES if quantize else ():  # all layers at once: a step is many small kernels
            names = [n for n in self.matrices if n.endswith(kind)]
            columns = torch.stack([self.masters[n].transpose(1, 2) for n in names])  # groups of 32 run along the input
            values = decode(*(part[None] for part in encode(columns)), torch.bfloat16)[0]
            for name, value in zip(names, values, strict=True):
                self.stored[name].copy_(value.transpose(1, 2))

    @torch.no_grad()
    def take_gradients(self) -> None:
        for name, parameter in self.stored.items():
            self.masters[name].grad = parameter.grad.float()
            parameter.grad = None


@torch.no_grad()
def drop_experts(model: GptOssForCausalLM, highest_share: float) -> None:
    """Send no token to some random experts in this step, so that others learn their work; ``store`` brings them back.

    The share is drawn anew each step, from none to ``highest_share``.
    """
    share = highest_share * torch.rand(())
    for layer in model.model.layers:
        bias = layer.mlp.router.bias
        bias.masked_fill_(torch.rand_like(bias, dtype=torch.float32) < share, float("-inf"))


def loss_of(model, router_logits: list, ids, weights) -> tuple[torch.Tensor, torch.Tensor]:
    """(training loss, mean NLL over completion tokens)."""
    router_logits.clear()
    hidden = model.model(ids).last_hidden_state[:, :-1]
    nll_sum = weight_sum = kept_sum = kept_count = 0.0
    targets, w = ids[:, 1:], weights[:, 1:]
    for rows in range(0, len(ids), 8):  # logits of 8 blocks at a time
        part = slice(rows, rows + 8)
        logits = model.lm_head(hidden[part]).float()
        nll = F.cross_entropy(logits.flatten(0, 1), targets[part].flatten(), reduction="none")
        flat = w[part].flatten()
        nll_sum, weight_sum = nll_sum + (nll * flat).sum(), weight_sum + flat.sum()
        kept = flat == 1.0
        kept_sum, kept_count = kept_sum + (nll.detach() * kept).sum(), kept_count + kept.sum()
    balance = load_balancing_loss_func(tuple(router_logits), model.config.num_local_experts, 4)
    return nll_sum / weight_sum + BALANCE_COEFFICIENT * balance, kept_sum / kept_count


@torch.no_grad()
def held_out_nll(model, router_logits: list, ids, weights) -> float:
    parts = [loss_of(model, router_logits, i, w)[1] for i, w in zip(ids.split(32), weights.split(32), strict=True)]
    return torch.stack(parts).mean().item()


def learning_rate(step: int, steps: int, peak: float) -> float:
    warmup = min(200, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) + 1e-6


def train(args) -> tuple[GptOssForCausalLM, StoredWeights, list[dict]]:
    torch.manual_seed(args.seed)
    model = GptOssForCausalLM(config()).to(args.device)
    if args.device == "cuda":
        model = model.to(torch.bfloat16)  # a CPU computes in float32, with the same rounded weights
    model.set_attn_implementation(attention.NAME)
    ExpertsInterface.register("cheap_gradients", experts_forward)
    model.set_experts_implementation("cheap_gradients")
    router_logits: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.router.register_forward_hook(lambda m, i, out: router_logits.append(out[0]))
    weights = StoredWeights(model)
    decay = [m for m in weights.masters.values() if m.ndim >= 2]
    no_decay = [m for m in weights.masters.values() if m.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": no_decay, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    tokens, loss_weights = load_rows(args.rows, args.device)
    held_out = 64 * SEQ_LEN
    stream = batches(tokens[:-held_out], loss_weights[:-held_out], args.batch_size, args.seed)
    test = (tokens[-held_out:].view(-1, SEQ_LEN).long(), loss_weights[-held_out:].view(-1, SEQ_LEN))

    curve, started = [], time.time()
    for step in range(args.steps):
        quantize = step >= QUANTIZE_FROM * args.steps
        weights.store(quantize)
        drop_experts(model, args.expert_dropout)
        loss, nll = loss_of(model, router_logits, *next(stream))
        loss.backward()
        weights.take_gradients()
        torch.nn.utils.clip_grad_norm_(weights.masters.values(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        optimizer.step()
        if step % 100 == 99 or step == args.steps - 1:
            weights.store(quantize)
            row = {
                "step": step + 1,
                "tokens": (step + 1) * args.batch_size * SEQ_LEN,
                "nll": round(nll.item(), 4),
                "held_out_nll": round(held_out_nll(model, router_logits, *test), 4),
                "quantized": quantize,
                "seconds": round(time.time() - started, 1),
            }
            curve.append(row)
            print(json.dumps(row), flush=True)
    weights.store(quantize=True)
    return model, weights, curve


def checkpoint_tensors(weights: StoredWeights) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, stored in weights.stored.items():
        if name in weights.matrices:
            blocks, scales = encode(weights.masters[name].transpose(1, 2))
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
        else:
            tensors[name] = stored.detach().bfloat16()  # on a CPU the rounded weights sit in float32
    return {name: t.contiguous().cpu() for name, t in tensors.items()}


def write_checkpoint(model: GptOssForCausalLM, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Sharded safetensors, index and configuration, beside the tokenizer that is already in ``folder``."""
    shards: list[dict] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    settings = model.config.to_diff_dict() | {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "architectures": ["GptOssForCausalLM"],
        "dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
    }
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="training rows written by demo/make_packs.py --train")
    parser.add_argument("out", type=Path, help="folder of the checkpoint; its tokenizer must be there")
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument(
        "--expert-dropout", type=float, default=0.25, help="highest share of experts that sit out a step"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="blocks of 2048 tokens a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    model, weights, curve = train(args)
    args.out.mkdir(parents=True, exist_ok=True)
    write_checkpoint(model, checkpoint_tensors(weights), args.out)
    args.out.with_name(f"{args.out.name}-curve.json").write_text("[\n" + ",\n".join(map(json.dumps, curve)) + "\n]\n")


if __name__ == "__main__":
    main()
