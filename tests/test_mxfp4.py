"""MXFP4 against transformers' decoder, and encoding against trying every code."""

import numpy as np
import pytest
import torch
import world
from hypothesis import given
from hypothesis import strategies as st
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from eaftlib.errors import CheckpointError
from eaftlib.kernels.mxfp4 import decode
from eaftlib.model.mxfp4 import encode, require_fit


def every_byte(scales):
    """Blocks [E, 1, 16, 16] that hold each byte once, under each of ``scales``."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(len(scales), 1, 1, 1)
    return blocks, torch.tensor(scales, dtype=torch.uint8).view(-1, 1, 1).expand(-1, 1, 16).contiguous()


def bits(x):
    return x.contiguous().view(torch.int16 if x.dtype == torch.bfloat16 else torch.int32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_byte_under_ordinary_scales_decodes_bit_for_bit(dtype):
    """Scales 2 to 252: every value is a normal number of both types."""
    blocks, scales = every_byte(range(2, 253))
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype).transpose(1, 2)
    assert torch.equal(bits(decode(blocks, scales, dtype)), bits(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_extreme_scales_decode_as_in_transformers(dtype):
    blocks, scales = every_byte([0, 1, 253, 254])
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype).transpose(1, 2)
    assert torch.equal(bits(decode(blocks, scales, dtype)), bits(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_random_expert_matrices_decode_bit_for_bit(dtype):
    blocks, scales = world.random_mxfp4(np.random.default_rng(0), 3, 10, 96)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype).transpose(1, 2)
    found = decode(blocks, scales, dtype)
    assert found.shape == (3, 10, 96) and torch.equal(bits(found), bits(expected))


def test_one_hand_decoded_group():
    blocks = torch.tensor([[[0x21, 0x7F] + [0] * 14]], dtype=torch.uint8)
    values = decode(blocks, torch.tensor([[128]], dtype=torch.uint8), torch.float32)
    assert values[0, :5].tolist() == [1.0, 2.0, -12.0, 12.0, 0.0]  # low nibble first, times 2


@pytest.mark.parametrize(
    "blocks, scales",
    [
        (torch.zeros(2, 3, 16, dtype=torch.uint8), torch.zeros(2, 4, dtype=torch.uint8)),
        (torch.zeros(2, 3, 15, dtype=torch.uint8), torch.zeros(2, 3, dtype=torch.uint8)),
        (torch.zeros(2, 3, 16, dtype=torch.int8), torch.zeros(2, 3, dtype=torch.uint8)),
    ],
)
def test_blocks_and_scales_that_do_not_fit_are_refused(blocks, scales):
    with pytest.raises(CheckpointError, match=r"MXFP4 blocks \(2, 3, 1[56]\)"):
        require_fit(blocks, scales)


def test_representable_values_survive_a_round_trip():
    rng = np.random.default_rng(0)
    magnitudes = world.E2M1[rng.integers(0, 16, (200, 32))]
    magnitudes[:, 0] = 6  # the scale is then determined
    values = torch.from_numpy(magnitudes * np.exp2(rng.integers(-20, 20, (200, 1))).astype(np.float32))
    assert torch.equal(decode(*encode(values), torch.float32), values)


def test_zeros_and_a_lone_outlier():
    values = torch.zeros(2, 64)
    values[1, 5] = -768.0
    assert torch.equal(decode(*encode(values), torch.float32), values)


def best_errors(group):
    """Least squared error of 32 numbers at each of the two candidate exponents, trying all codes for every number."""
    peak = np.abs(group).max()
    low = int(np.floor(np.log2(peak))) - 2
    grid = world.E2M1.astype(np.float64)
    return [sum(min((x - 2.0**e * v) ** 2 for v in grid) for x in group) for e in (low, low + 1)]


def check_encoding(group):
    values = np.array(group, np.float64)
    decoded = decode(*encode(torch.tensor(group, dtype=torch.float32)), torch.float32).double().numpy()
    error, candidates = ((decoded - values) ** 2).sum(), best_errors(values)
    assert error == pytest.approx(min(candidates), rel=1e-5, abs=1e-9)
    return candidates


@given(st.lists(st.floats(-100, 100, width=32), min_size=32, max_size=32).filter(lambda g: max(map(abs, g)) > 1e-3))
def test_no_encoding_at_either_exponent_is_better(group):
    check_encoding(group)


def test_both_exponents_are_chosen_where_they_are_better():
    groups = np.random.default_rng(0).normal(size=(60, 32)).astype(np.float32)
    candidates = [check_encoding(group.tolist()) for group in groups]
    assert 5 < sum(high < low for low, high in candidates) < 55


def test_halfway_values_round_to_the_even_code():
    """Between code 2k and 2k + 1 the even one wins: 0.25 -> 0, 0.75 -> 1, 1.25 -> 1, 1.75 -> 2, 2.5 -> 2, 3.5 -> 4, 5 -> 4."""
    values = torch.zeros(32)
    values[:8] = torch.tensor([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert decode(*encode(values), torch.float32)[:8].tolist() == [6.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
