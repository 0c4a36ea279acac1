"""NLL, top-K entropy and KL against arithmetic with 40 decimal digits."""

from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eaftlib.kernels.divergence import Reference
from eaftlib.kernels.token_statistics import SLICE_BYTES, logits_of, slice_rows, token_statistics, top_logits

VOCABS = [20, 21, 64, 1280, 1343, 1344, 2560]  # 64 divides 1280 = 20 groups, 1344 = 21, 2560 = 40


def exact(logits, target, k):
    """(nll, entropy over ln k) as Decimals of one token's float32 logits."""
    with localcontext() as context:
        context.prec = 40
        z = [Decimal(float(x)) for x in logits]
        nll = sum((x - max(z)).exp() for x in z).ln() + max(z) - z[target]
        top = sorted(z, reverse=True)[:k]
        weights = [(x - top[0]).exp() for x in top]
        shares = [w / sum(weights) for w in weights]
        entropy = -sum(p * p.ln() for p in shares if p > 0) / Decimal(k).ln()
        return float(nll), float(entropy)


def check(logits, targets, k=20):
    nll, entropy = token_statistics(logits, targets, k)
    ulp = float(np.spacing(np.float32(logits.abs().max().item() + 1)))
    for t in range(len(logits)):
        expected = exact(logits[t], int(targets[t]), k)
        assert nll[t].item() == pytest.approx(expected[0], abs=4 * ulp, rel=1e-6)
        assert entropy[t].item() == pytest.approx(expected[1], abs=2e-6)
    assert nll.dtype == entropy.dtype == torch.float32


def random_logits(tokens, vocab, scale=3.0, seed=0):
    return torch.randn(tokens, vocab, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])
def test_random_logits(vocab, scale):
    targets = torch.tensor([0, vocab - 1, vocab // 2])
    check(random_logits(3, vocab, scale), targets)


@pytest.mark.parametrize("vocab", VOCABS)
def test_flat_logits_have_entropy_one(vocab):
    nll, entropy = token_statistics(torch.full((1, vocab), 7.0), torch.tensor([3]), 20)
    assert nll.item() == pytest.approx(np.log(vocab), rel=1e-6) and entropy.item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("vocab", [64, 1344, 2000])
def test_one_dominant_logit(vocab):
    logits = random_logits(2, vocab, 1.0)
    logits[:, 11] = 40.0
    check(logits, torch.tensor([11, 12]))
    assert token_statistics(logits, torch.tensor([11, 12]), 20)[1].max() < 1e-6


@pytest.mark.parametrize("vocab", [100, 1344, 2560])
@pytest.mark.parametrize("above", [0, 5, 19])
def test_ties_at_the_twentieth_place(vocab, above):
    """``above`` clear leaders and many equal candidates for the remaining places."""
    logits = random_logits(1, vocab, 1.0).clamp(max=1.5)
    logits[0, :: max(1, vocab // 60)] = 2.0
    logits[0, 1 : 1 + above] = torch.linspace(3, 4, above)
    check(logits, torch.tensor([0]))


@pytest.mark.parametrize("where", ["one group", "one per group", "last group"])
def test_the_top_twenty_wherever_they_lie(where):
    logits = random_logits(1, 64 * 30, 1.0)
    columns = {
        "one group": torch.arange(64, 84),
        "one per group": torch.arange(20) * 64 + 63,
        "last group": torch.arange(64 * 30 - 20, 64 * 30),
    }[where]
    logits[0, columns] = torch.linspace(5, 7, 20)
    check(logits, torch.tensor([0]))
    assert top_logits(logits, 20)[0].tolist() == sorted(logits[0, columns].tolist(), reverse=True)


@pytest.mark.parametrize("sign", [1, -1])
def test_logits_of_size_100(sign):
    check(random_logits(2, 1344, 2.0) + sign * 100, torch.tensor([1, 1343]))
    check(sign * torch.linspace(-100, 100, 1344).repeat(2, 1), torch.tensor([0, 1343]))


@pytest.mark.parametrize("k", [2, 5, 64])
def test_other_k(k):
    check(random_logits(2, 64 * 70), torch.tensor([5, 9]), k)


@given(st.integers(0, 2**31), st.integers(1, 25), st.integers(2, 24), st.integers(0, 3))
def test_top_logits_equal_a_sort(seed, groups, k, levels):
    """Few distinct levels make ties everywhere."""
    logits = random_logits(2, 64 * groups, seed=seed)
    if levels:
        logits = (logits * levels).round()
    assert top_logits(logits, k).tolist() == [sorted(row, reverse=True)[:k] for row in logits.tolist()]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("vocab", [100, 2560])
def test_bad_logits_never_get_a_finite_value(bad, vocab):
    logits = random_logits(3, vocab)
    logits[1, 70] = bad
    nll, entropy = token_statistics(logits, torch.tensor([70, 70, 70]), 20)
    finite = torch.isfinite(nll) & torch.isfinite(entropy)
    assert finite.tolist() == [True, False, True]


def test_nan_outside_the_top_logits_is_seen():
    logits = random_logits(1, 2560)
    logits[0, 2000] = float("nan")
    nll, entropy = token_statistics(logits, torch.tensor([0]), 20)
    assert not (torch.isfinite(nll) & torch.isfinite(entropy)).any()


def exact_kl(base, other):
    with localcontext() as context:
        context.prec = 40
        z, y = ([Decimal(float(x)) for x in row] for row in (base, other))
        lse_z, lse_y = (sum((x - max(row)).exp() for x in row).ln() + max(row) for row in (z, y))
        return float(sum((a - lse_z).exp() * ((a - lse_z) - (b - lse_y)) for a, b in zip(z, y, strict=True)))


@pytest.mark.parametrize("scale, apart", [(1.0, 0.0), (3.0, 0.05), (3.0, 2.0), (30.0, 30.0)])
def test_kl_and_top1_against_exact_sums(scale, apart):
    base = random_logits(5, 700, scale)
    other = base + random_logits(5, 700, apart, seed=1)
    kl, same = Reference(base).compare(other)
    ulp = float(np.spacing(np.float32(max(base.abs().max(), other.abs().max()).item() + 1)))
    for t in range(5):
        assert kl[t].item() == pytest.approx(exact_kl(base[t], other[t]), abs=8 * ulp, rel=1e-5)
        assert same[t].item() == (int(np.argmax(base[t].numpy())) == int(np.argmax(other[t].numpy())))
    assert apart or (same.all() and kl.max() < 1e-5)


def test_half_precision_logits_accumulate_in_float32():
    hidden, head = random_logits(4, 256).bfloat16(), random_logits(50, 256, seed=1).bfloat16()
    expected = hidden.double() @ head.double().T
    logits = logits_of(hidden, head.float())  # a CPU pass converts the head once
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("vocab, size, rows", [(1, 4, 1), (100, 400, 1), (100, 799, 1), (100, 800, 2), (100, 3, 1)])
def test_slices_fit_their_bytes_and_hold_at_least_one_token(vocab, size, rows, monkeypatch):
    monkeypatch.setitem(SLICE_BYTES, "cpu", size)
    assert slice_rows(vocab, torch.device("cpu")) == rows
