"""Several processes that accelerate launches give, each of them, what one process gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from eaftlib.evaluation import results
from eaftlib.pruning.trace import Trace

ROOT = Path(__file__).parents[1]
PROGRAM = """
import os, sys
import numpy as np, torch
from eaftlib.engine import placement as devices, traversal
from eaftlib.evaluation import evaluate as evaluation
from eaftlib.pruning.trace import record
from eaftlib.model.checkpoint import Checkpoint
from eaftlib.pruning.keepsets import KeepSet
from eaftlib.text.packs import PackSource, pack_blocks

model, packs, out, device, count = sys.argv[1:]
out += "-" + os.environ.get("RANK", "alone")
traversal.MICRO_BATCH_TOKENS |= {"cpu": 80, "cuda": 80}
checkpoint, source = Checkpoint(model), PackSource(packs)
placement = devices.place(device, "float32")
keep = KeepSet(np.tile(np.arange(4), (checkpoint.num_layers, 1)), checkpoint.num_experts, {"criterion": "first", "keep_n": 4})
evaluation.evaluate(checkpoint, source, placement, {"base": None, "half": keep}, seq_lens=[24, 40], num_blocks=int(count),
                    only=["UNION"], out_dir=out, progress=False)
spans = checkpoint.family.completion_spans
blocks = pack_blocks(source, "UNION", checkpoint.tokenizer, spans, seq_len=40, num_blocks=int(count))
trace, _ = record(checkpoint, blocks, placement, recon_tokens=9, progress=False)
from pathlib import Path
trace.save(Path(out) / "trace.safetensors")
"""


def environment():
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return inherited | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def without_timings(folder):
    content = [json.loads((folder / f"{label}.json").read_text()) for label in ("base", "half")]
    for result in content:
        result["meta"].pop("tokens_sha256", None)
        for pack in result["packs"]:
            for entry in pack["seq"].values():
                assert entry["model"].pop("tok_s_pred") > 0
    return content


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("processes, blocks", [(2, 5), (3, 3)])
def test_ranks_together_give_what_one_gives(model_folder, packs_folder, tmp_path, device, processes, blocks):
    """5 blocks in micro-batches of 2: ranks with unequal shares; 3 blocks: one of three ranks gets none."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    arguments = [program, model_folder, packs_folder, tmp_path / "out", device, str(blocks)]
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--main_process_port", "0", "--num_processes", str(processes)]
    for command in ([], launch):
        subprocess.run([sys.executable, *command, *arguments], env=environment(), check=True, capture_output=True)
    alone = tmp_path / "out-alone"
    for rank in range(processes):
        together = tmp_path / f"out-{rank}"
        assert without_timings(together) == without_timings(alone)
        for label in ("base", "half"):
            a, b = (results.read(folder / f"{label}.json") for folder in (alone, together))
            for key in a.entries:
                for column in ("block", "position", "nll", "entropy"):
                    np.testing.assert_array_equal(getattr(a.tokens(*key), column), getattr(b.tokens(*key), column))
        a, b = (Trace.load(folder / "trace.safetensors") for folder in (alone, together))
        for name in ("nll", "entropy", "expert", "gate", "norm", "peak", "grams", "router_logits"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert torch.isfinite(torch.from_numpy(a.norm)).all() and (a.norm > 0).all()
    assert a.grams.shape[1] == 9 and (a.grams[:, :, 0] > 0).all()
