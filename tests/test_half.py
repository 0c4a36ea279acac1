"""Products of float16 operands: as near to float32 as can be, and no value lost to float16's range without a word.

Checkpoints that overflow are the demo model rewritten by powers of two, under which its logits stay what they are: all that
is added to the residual and the embedding may grow alike, for every reader of the residual normalises it first; and a norm's
weight may grow as what it feeds shrinks.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import world
from safetensors.torch import load_file, save_file

from eaftlib.engine import forward, half
from eaftlib.engine.placement import place
from eaftlib.engine.weights import Weights
from eaftlib.errors import ParameterError
from eaftlib.kernels import mxfp4
from eaftlib.model.checkpoint import Checkpoint
from eaftlib.text.packs import PackSource, pack_blocks

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "demo"
CAPABILITIES = ("75", "80", "89", "90")
ADDED = r"(o_proj\.(weight|bias)|down_proj_bias|embed_tokens\.weight)$"  # to the residual; and down_proj in MXFP4


@pytest.fixture(scope="module")
def blocks():
    demo = Checkpoint(str(DEMO / "model"))
    spans = demo.family.completion_spans
    return pack_blocks(PackSource(str(DEMO / "packs")), "UNION", demo.tokenizer, spans, seq_len=256, num_blocks=3)


def rewritten(folder, power_of):
    """The demo model with each tensor, or MXFP4 scale, multiplied by two to the power that its name gets."""
    shutil.copytree(DEMO / "model", folder)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            power = power_of(name)
            if name.endswith("_scales"):
                tensors[name] = (tensor.int() + power).to(torch.uint8)
            elif not name.endswith("_blocks"):
                tensors[name] = (tensor.float() * 2.0**power).to(tensor.dtype)
        save_file(tensors, path, {"format": "pt"})
    return Checkpoint(str(folder))


def grown_residual(power):
    return lambda name: power if re.search(ADDED, name) or name.endswith("down_proj_scales") else 0


def grown_norms(power):
    """Both norms of every layer; what they feed shrinks."""

    def of(name):
        if re.search(r"layers\.\d+\..*layernorm\.weight$", name):
            return power
        return -power if re.search(r"([qkv]_proj|router)\.weight$|gate_up_proj_scales$", name) else 0

    return of


def scored(checkpoint, blocks, dtype):
    run = forward.score(Weights(checkpoint, place("cpu", dtype)), blocks, progress=False)
    return run.variants[0].nll.astype(np.float64)


def rms(found, expected):
    return float(np.sqrt(np.mean((found - expected) ** 2)))


@pytest.fixture(scope="module")
def demo_scores(blocks):
    demo = Checkpoint(str(DEMO / "model"))
    return {dtype: scored(demo, blocks, dtype) for dtype in ("float32", "bfloat16", "float16")}


def test_float16_products_err_less_than_bfloat16(demo_scores):
    exact = demo_scores["float32"]
    assert 0 < rms(demo_scores["float16"], exact) < 0.25 * rms(demo_scores["bfloat16"], exact)
    ppl = {dtype: np.exp(nll.mean()) for dtype, nll in demo_scores.items()}
    assert abs(ppl["float16"] / ppl["float32"] - 1) < 5e-4


def largest_values(checkpoint, blocks):
    """In float32, by hooks on every layer: the largest of the residual, and of a single expert's output."""
    from transformers import AutoModelForCausalLM

    model = world.load_with_transformers(AutoModelForCausalLM, Path(checkpoint.folder))
    residual, outputs = [], []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, out: residual.append(float(out.abs().max())))
        layer.mlp.register_forward_pre_hook(lambda module, args: outputs.append(_largest_output(module, args[0])))
    with torch.no_grad():
        model(torch.from_numpy(blocks.tokens).long())
    return max(residual), max(outputs)


def _largest_output(mlp, hidden):
    """Of every expert on its tokens, before the router weight."""
    x = hidden.flatten(0, 1)
    ids, experts = mlp.router(x)[2], mlp.experts
    largest = 0.0
    for expert in ids.unique().tolist():
        rows = x[(ids == expert).any(1)]
        gate_up = rows @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
        gate, up = gate_up[:, ::2].clamp(max=7), gate_up[:, 1::2].clamp(-7, 7)
        y = ((up + 1) * gate * torch.sigmoid(1.702 * gate)) @ experts.down_proj[expert] + experts.down_proj_bias[expert]
        largest = max(largest, float(y.abs().max()))
    return largest


@pytest.mark.parametrize("power", [15, 22], ids=["weights that fit", "weights that do not"])
def test_a_residual_and_an_experts_output_beyond_float16(tmp_path, blocks, demo_scores, power):
    """No operand of the first is too large, so that nothing is widened; of the second, some weights are."""
    checkpoint = rewritten(tmp_path / "grown", grown_residual(power))
    residual, output = largest_values(checkpoint, blocks)
    assert residual > 65504 and output > 65504  # either is infinite in plain float16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = scored(checkpoint, blocks, "float16")
    exact = scored(checkpoint, blocks, "float32")
    assert rms(exact, demo_scores["float32"]) < 0.02  # the epsilon of the norms weighs less
    assert rms(found, exact) < rms(scored(checkpoint, blocks, "bfloat16"), exact)
    layer = next(iter(Weights(checkpoint, place("cpu", "float16")).layers()))[1]
    kept_in = torch.float16 if power == 15 else torch.float32
    assert layer.mlp.experts.down_proj.dtype == layer.self_attn.o_proj.weight.dtype == kept_in
    assert layer.mlp.experts.gate_up_proj.dtype == layer.self_attn.q_proj.weight.dtype == torch.float16


def test_operands_beyond_float16_are_named_and_computed_in_float32(tmp_path, blocks, demo_scores):
    checkpoint = rewritten(tmp_path / "norms", grown_norms(16))
    with pytest.warns(UserWarning) as caught:
        found = scored(checkpoint, blocks, "float16")
    said = [str(w.message) for w in caught]
    for layer in range(6):
        assert (
            f"layer {layer}: hidden states entering attention exceed float16; computed in float32 from now on" in said
        )
        assert (
            f"layer {layer}: hidden states entering the experts exceed float16; computed in float32 from now on" in said
        )
    assert len(said) == 12  # each once, though three blocks came by
    assert rms(found, demo_scores["float32"]) < rms(demo_scores["bfloat16"], demo_scores["float32"])


def test_what_was_widened_once_stays_so(tmp_path, blocks):
    """Also where layers are read again, by the next pass."""
    weights = Weights(rewritten(tmp_path / "norms", grown_norms(16)), place("cpu", "float16"))
    with pytest.warns(UserWarning, match="exceed float16"):
        first = forward.score(weights, blocks, progress=False).variants[0].nll
    weights._kept.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = forward.score(weights, blocks, progress=False).variants[0].nll
    assert np.array_equal(first, again)


def test_recording_experts_measures_what_float32_measures(blocks):
    demo, traces = Checkpoint(str(DEMO / "model")), {}
    for dtype in ("float32", "float16"):
        run = forward.score(Weights(demo, place("cpu", dtype)), blocks, record_experts=True, progress=False)
        traces[dtype] = run.experts
    found, exact = traces["float16"], traces["float32"]
    same = (found.expert == exact.expert).all(-1)
    assert same.float().mean() > 0.98  # where two experts are nearly equal, rounding decides
    for name in ("gate", "norm", "peak"):
        a, b = getattr(found, name)[same], getattr(exact, name)[same]
        assert torch.linalg.vector_norm(a - b) < 5e-3 * torch.linalg.vector_norm(b), name


def test_a_masked_variant_is_masked_in_float16_too(blocks):
    demo, keep = Checkpoint(str(DEMO / "model")), np.ones((6, 32), bool)
    keep[:, 5:21] = False
    found = {}
    for dtype in ("float32", "float16"):
        weights = Weights(demo, place("cpu", dtype))
        found[dtype] = forward.score(weights, blocks, keep_sets=[keep], progress=False).variants[0].nll.astype(float)
    assert rms(found["float16"], found["float32"]) < 0.02


@pytest.mark.parametrize(
    "value, fits", [(65504.0, True), (65536.0, False), (float("inf"), False), (float("nan"), False)]
)
def test_a_weight_is_narrowed_where_float16_holds_it(value, fits):
    stored = torch.tensor([[1.0, value]])
    assert half.narrowed_weight(stored).dtype == (torch.float16 if fits else torch.float32)


def test_a_weight_of_values_below_float16s_step_stays_wide():
    assert half.narrowed_weight(torch.full((4, 4), 2.0**-27)).dtype == torch.float32
    assert (
        half.narrowed_weight(torch.tensor([[1.0, 2.0**-27]])).dtype == torch.float16
    )  # beside which it does not count


@pytest.mark.parametrize("exponent", range(95, 145))
def test_scales_that_fit_lose_nothing_that_counts(exponent):
    """All sixteen codes with one scale, decoded to float16 and to float32."""
    codes = torch.arange(16, dtype=torch.uint8)[None, None, None]
    values = {
        dtype: mxfp4.decode(codes * 17, torch.full((1, 1, 1), exponent, dtype=torch.uint8), dtype).double()
        for dtype in (torch.float16, torch.float32)
    }
    exact = values[torch.float32]
    error = torch.linalg.vector_norm(values[torch.float16] - exact) / torch.linalg.vector_norm(exact)
    if half.fits_half(torch.full((1, 1, 1), exponent, dtype=torch.uint8)):
        assert error == 0
    if exponent > 140:
        assert not error < 1 and not half.fits_half(torch.full((1, 1, 1), exponent, dtype=torch.uint8))


def test_one_expert_of_too_large_scales_keeps_all_of_them_wide():
    scales = torch.full((3, 4, 2), 120, dtype=torch.uint8)
    assert half.fits_half(scales)
    scales[1, 2, 0] = 141
    assert not half.fits_half(scales)


def test_training_and_foreign_backends_are_refused():
    demo = Checkpoint(str(DEMO / "model"))
    with pytest.raises(ParameterError, match="dtype: found 'float16', which has no gradients here"):
        Weights(demo, place("cpu", "float16"), training=True)
    with pytest.raises(ParameterError, match="'fused' does not compute in float16"):
        Weights(demo, place("cpu", "float16", backend="fused"))
    with pytest.raises(ParameterError, match="'turing' does not compute in float32"):
        Weights(demo, place("cpu", "float32", backend="turing"))
    with pytest.raises(ParameterError, match=r"'turing' needs an NVIDIA GPU of capability 7\.0 or more; found cpu"):
        Weights(demo, place("cpu", "float16", backend="turing"))


@pytest.fixture(scope="module")
def shared_memory():
    """kernel -> capability -> bytes"""
    if sys.platform != "linux":
        pytest.skip("Triton compiles on Linux")
    script = Path(__file__).with_name("ahead_of_time.py")
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    settings["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=settings)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_between_products_compiles_for_turing_and_later(shared_memory):
    assert set(shared_memory) == {"decode", "activate", "combine", "rotary", "statistics", "divergence"}
    assert all(set(sizes) == set(CAPABILITIES) for sizes in shared_memory.values())
    assert max(size for sizes in shared_memory.values() for size in sizes.values()) <= 4096  # Turing has 65,536 to give


def test_no_kernel_between_products_multiplies_matrices(shared_memory):
    """On Turing Triton's matrix product falls back to plain multiply-adds."""
    for path in (ROOT / "eaftlib/kernels/fused").glob("*.py"):
        assert path.stem == "attention" or "tl.dot" not in path.read_text(), path
