"""The tiny world the tests live in: a random gpt-oss checkpoint, a tokenizer, packs; written without eaftlib."""

import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Mxfp4Config

LAYERS, EXPERTS, TOP_K = 4, 8, 2
HIDDEN, INTERMEDIATE, VOCAB = 64, 96, 512
HEADS, KV_HEADS, HEAD_DIM, WINDOW = 4, 2, 32, 16
SPECIAL = [
    "<|startoftext|>",
    "<|return|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)

RANK_SETTINGS = {
    "packs": "packs",
    "pack_files": None,
    "cc_quantile": 0.15,
    "w_good": 1.0,
    "w_uncertain": 0.25,
    "w_conflict": -2.0,
    "align": "predictor",
}

CONFIG = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "num_hidden_layers": LAYERS,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "experts_per_token": TOP_K,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "vocab_size": VOCAB,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
    "max_position_embeddings": 1024,
    "initial_context_length": 64,
    "rope_theta": 150000,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 16.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 64,
    },
    "rms_norm_eps": 1e-5,
    "swiglu_limit": 7.0,
    "attention_bias": True,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "eos_token_id": 1,
    "pad_token_id": 0,
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


def random_mxfp4(rng, experts, rows, columns):
    """(blocks, scales) of random MXFP4 numbers with a standard deviation near columns ** -0.5."""
    codes = rng.integers(0, 16, (experts, rows, columns // 32, 32), dtype=np.uint8)
    exponent = round(np.log2(columns**-0.5 / 3))
    scales = (127 + exponent + rng.integers(-1, 2, codes.shape[:-1])).astype(np.uint8)
    return pack_nibbles(codes), torch.from_numpy(scales)


def pack_nibbles(codes):
    return torch.from_numpy(codes[..., 0::2] | (codes[..., 1::2] << 4))


def state_dict(seed=0, experts=EXPERTS):
    """Tensors in the published names, shapes and types: MXFP4 experts, everything else bfloat16."""
    rng = np.random.default_rng(seed)

    def bf16(*shape, std=1.0, mean=0.0):
        return torch.from_numpy(rng.normal(mean, std, shape).astype(np.float32)).bfloat16()

    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    state = {"model.embed_tokens.weight": bf16(VOCAB, HIDDEN)}
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        for name, size in (("q", q), ("k", kv), ("v", kv)):
            state[f"{p}self_attn.{name}_proj.weight"] = bf16(size, HIDDEN, std=HIDDEN**-0.5)
            state[f"{p}self_attn.{name}_proj.bias"] = bf16(size, std=0.5)
        state[f"{p}self_attn.o_proj.weight"] = bf16(HIDDEN, q, std=q**-0.5)
        state[f"{p}self_attn.o_proj.bias"] = bf16(HIDDEN, std=0.2)
        state[f"{p}self_attn.sinks"] = bf16(HEADS)
        state[f"{p}input_layernorm.weight"] = bf16(HIDDEN, std=0.1, mean=1.0)
        state[f"{p}post_attention_layernorm.weight"] = bf16(HIDDEN, std=0.1, mean=1.0)
        state[f"{p}mlp.router.weight"] = bf16(experts, HIDDEN, std=2 * HIDDEN**-0.5)
        state[f"{p}mlp.router.bias"] = bf16(experts, std=0.5)
        for name, rows, columns in (("gate_up", 2 * INTERMEDIATE, HIDDEN), ("down", HIDDEN, INTERMEDIATE)):
            blocks, scales = random_mxfp4(rng, experts, rows, columns)
            state[f"{p}mlp.experts.{name}_proj_blocks"] = blocks
            state[f"{p}mlp.experts.{name}_proj_scales"] = scales
            state[f"{p}mlp.experts.{name}_proj_bias"] = bf16(experts, rows, std=0.5)
    state["model.norm.weight"] = bf16(HIDDEN, std=0.1, mean=1.0)
    state["lm_head.weight"] = bf16(VOCAB, HIDDEN, std=2 * HIDDEN**-0.5)
    return state


def write_checkpoint(folder, state=None, shards=3, **config):
    folder.mkdir()
    state = state_dict() if state is None else state
    names = list(state)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i:05d}-of-{shards:05d}.safetensors"
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        save_file({name: state[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.nbytes for t in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "LICENSE").write_text("Apache")
    write_tokenizer(folder)
    return folder


def hand_made_ranking(criteria, **shape):
    """The content of a ranking.json; shape: num_layers, num_experts, top_k. What it came from is made up."""
    provenance = {"model_id": "m", "pack": "UNION", "rows": "calib", "device": "cpu", "dtype": "float32", "seed": 0}
    provenance |= {
        "rows_seen": 9,
        "seq_len": 40,
        "num_blocks": 5,
        "kept_tokens": 33,
        "entropy_topk": 20,
        "eos_token_id": 1,
    }
    hashed = ("model", "tokenizer", "rows", "saliency", "grams")
    provenance |= RANK_SETTINGS | {f"{of}_sha256": hashlib.sha256(of.encode()).hexdigest() for of in hashed}
    return sealed({"schema": "eaft-ranking/1", "provenance": provenance, **shape, "criteria": criteria})


def sealed(ranking):
    """The content of a ranking.json with the hash that goes with it."""
    provenance = {name: value for name, value in ranking["provenance"].items() if name != "sha256"}
    text = json.dumps({"provenance": provenance, "criteria": ranking["criteria"]}, sort_keys=True)
    return ranking | {"provenance": provenance | {"sha256": hashlib.sha256(text.encode()).hexdigest()}}


def write_tokenizer(folder):
    """Byte-level BPE with merges, so that tokens straddle Harmony's tags and split characters of several bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([sentence(i) for i in range(200)], trainer)
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    assert tokenizer.get_vocab_size() <= VOCAB
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|return|>", "pad_token": "<|startoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def sentence(i):
    rng = np.random.default_rng(i)
    words = [
        "the",
        "expert",
        "router",
        "keeps",
        "größer",
        "日本語",
        "🙂",
        "42",
        "=",
        "sum",
        "tokens",
        "then",
        "therefore",
    ]
    return " ".join(rng.choice(words, rng.integers(3, 14)))


def conversation(i):
    call = (
        "<|start|>assistant to=functions.add<|channel|>commentary <|constrain|>json<|message|>"
        f'{{"a": {i}}}<|call|><|start|>functions.add to=assistant<|channel|>commentary<|message|>{i}<|end|>'
    )
    return (
        f"<|start|>system<|message|>{sentence(3 * i)}<|end|><|start|>user<|message|>{sentence(3 * i + 1)}<|end|>"
        f"<|start|>assistant<|channel|>analysis<|message|>{sentence(3 * i + 2)}<|end|>"
        + (call if i % 3 == 0 else "")
        + f"<|start|>assistant<|channel|>final<|message|>{sentence(i + 1000)}<|return|>"
    )


def write_packs(folder, sizes=(20, 14, 8)):
    for pack, size in enumerate(sizes):
        write_pack(folder / f"pack_{'abc'[pack]}.parquet", [conversation(100 * pack + i) for i in range(size)])
    return folder


def write_pack(path, rows, column="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: pa.array(rows, pa.string())}), path)
    return path


def load_with_transformers(cls, folder):
    model = cls.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        quantization_config=Mxfp4Config(dequantize=True) if "quantization_config" in read_config(folder) else None,
    )
    return model.float().eval()  # MXFP4 values, which early releases decode to bfloat16 whatever is asked for


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def mask_routers(model, removed):
    """Hooks that put the router logits of ``removed`` (bool [L, E]) at minus infinity; returns their handles."""

    def masked(gone):
        def hook(router, args, output):
            logits = torch.nn.functional.linear(args[0], router.weight, router.bias).masked_fill(gone, float("-inf"))
            top, ids = logits.topk(router.top_k, dim=-1)
            return logits, top.softmax(-1), ids

        return hook

    layers = zip(model.model.layers, torch.from_numpy(removed), strict=True)
    return [layer.mlp.router.register_forward_hook(masked(gone)) for layer, gone in layers]


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(tokens).long(), use_cache=False).logits
