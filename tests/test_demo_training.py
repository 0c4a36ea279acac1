"""demo/train.py, at a small size on a CPU."""

import argparse
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GptOssConfig

from eaftlib.model.checkpoint import Checkpoint

DEMO = Path(__file__).parents[1] / "demo"
VOCABULARY, BLOCKS = 4096, 70  # 64 of the blocks are held out


@pytest.fixture(scope="module")
def trainer():
    spec = importlib.util.spec_from_file_location("demo_train", DEMO / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.SEQ_LEN = 32
    module.config = lambda: GptOssConfig(
        num_hidden_layers=2, num_local_experts=8, num_experts_per_tok=4, vocab_size=VOCABULARY, hidden_size=32,
        intermediate_size=32, head_dim=16, num_attention_heads=2, num_key_value_heads=1, sliding_window=16,
    )  # fmt: skip
    return module


def test_the_checkpoint_holds_the_weights_that_the_last_step_would_run_with(trainer, tmp_path):
    rng = np.random.default_rng(0)
    count = BLOCKS * trainer.SEQ_LEN
    np.savez(
        tmp_path / "rows.npz",
        tokens=rng.integers(0, VOCABULARY, count).astype(np.uint16),
        kept=np.packbits(rng.random(count) < 0.5),
    )
    folder = tmp_path / "model"
    folder.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        shutil.copy(DEMO / "model" / file, folder)
    args = argparse.Namespace(
        rows=tmp_path / "rows.npz", steps=5, expert_dropout=0.4, batch_size=2, lr=1e-2, seed=0, device="cpu"
    )
    model, weights, curve = trainer.train(args)
    trainer.write_checkpoint(model, trainer.checkpoint_tensors(weights), folder)
    assert [row["step"] for row in curve] == [5] and curve[0]["quantized"] and np.isfinite(curve[0]["held_out_nll"])
    checkpoint = Checkpoint(str(folder))
    assert (checkpoint.num_layers, checkpoint.num_experts) == (2, 8)
    read = type(model).from_pretrained(folder, dtype=torch.bfloat16).state_dict()  # transformers decodes MXFP4
    for name, stored in weights.stored.items():
        assert torch.equal(read[name].float(), stored.float()), name
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "mxfp4"
