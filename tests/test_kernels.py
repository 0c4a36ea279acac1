"""The Triton kernels against float64: each may err little more than its plain version in the tested dtype.

Compiled on a GPU, interpreted elsewhere. What a kernel reads and writes lies between fences of NaN, and what it
allocates starts as NaN: reading past the end, writing past the end and leaving a value unwritten all show.
"""

import math

import pytest
import torch
from test_token_statistics import exact, random_logits
from torch.overrides import TorchFunctionMode
from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb

from eaftlib.kernels import divergence as plain_divergence
from eaftlib.kernels import expert_activation as plain_activation
from eaftlib.kernels import expert_combination as plain_combination
from eaftlib.kernels import mxfp4 as plain_mxfp4
from eaftlib.kernels import token_statistics as plain_statistics
from eaftlib.kernels.fused import attention, divergence, expert_activation, expert_combination, mxfp4, rotary
from eaftlib.kernels.fused import token_statistics as statistics

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FENCE = 1 << 16  # bytes, more than any tile of these tests
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FLOATS = [BF16, FP16, FP32]
HALVES = [FP16, BF16] if DEVICE == "cuda" else [FP16]  # the interpreter multiplies no bfloat16 matrices
EPS = torch.finfo(FP32).eps
NAN = float("nan")
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy, interpreting


def fence(like):
    """(an unset contiguous tensor like ``like``, the bytes around it): all bits 1, which is NaN, -1 or 255."""
    raw = torch.full((like.nbytes + 2 * FENCE,), 255, dtype=torch.uint8, device=like.device)
    return raw[FENCE : FENCE + like.nbytes].view(like.dtype).view(like.shape), raw


def on(*tensors):
    """Copies on DEVICE, each between its fences."""
    fenced = [fence(x.to(DEVICE))[0].copy_(x) for x in tensors]
    return fenced if len(fenced) > 1 else fenced[0]


class Fenced(TorchFunctionMode):
    """Puts what is allocated inside between fences, and sees on leaving that they stand."""

    def __enter__(self):
        self.raw = []
        return super().__enter__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.empty, torch.empty_like, torch.Tensor.new_empty) and result.numel():
            result, raw = fence(result)
            self.raw.append(raw)
        return result

    def __exit__(self, *error):
        super().__exit__(*error)
        if error[0] is None:
            assert self.raw
            assert all((raw[:FENCE] == 255).all() and (raw[-FENCE:] == 255).all() for raw in self.raw)


def run(kernel, *args, **options):
    """The kernel's results, on the CPU."""
    with Fenced():
        results = kernel(*args, **options)
    single = not isinstance(results, tuple)
    results = tuple(x if x is None else x.cpu() for x in ((results,) if single else results))
    return results[0] if single else results


def near(found, plain, truth, slack=4 * EPS):
    """The largest error is at most twice the plain version's, and ``slack`` of the largest value (or of 1)."""
    if found.dtype == BF16 and DEVICE == "cpu":
        slack = torch.finfo(BF16).eps  # the interpreter cuts to bfloat16 instead of rounding
    assert found.shape == truth.shape and found.dtype == plain.dtype and truth.dtype == torch.float64
    error, allowed = ((x.double() - truth).abs().max().item() for x in (found, plain))
    allowed = 2 * allowed + slack * max(1.0, truth.abs().max().item())
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- token statistics ---------------------------------------------------------------------------------------------

LANES = 64
VOCABS = [LANES - 14, LANES, LANES + 1, 3 * LANES, 5 * LANES + 23]


def check_statistics(logits, targets, k=20, lanes=LANES):
    targets = torch.as_tensor(targets)
    nll, entropy = run(statistics.token_statistics, *on(logits, targets), k, lanes=lanes)
    z = logits.double()
    top = torch.log_softmax(z.topk(k).values, -1)
    plain = plain_statistics.token_statistics(logits, targets, k)
    near(nll, plain[0], -torch.log_softmax(z, -1).gather(1, targets[:, None])[:, 0])
    near(entropy, plain[1], -(top.exp() * top).sum(-1) / math.log(k))
    return nll, entropy


@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])
@pytest.mark.parametrize("vocab", VOCABS)
def test_statistics_of_every_vocabulary(vocab, scale):
    """Targets at both ends and inside; with scale 3 most lie outside the top 20."""
    check_statistics(random_logits(4, vocab, scale), [0, vocab - 1, vocab // 2, LANES // 2])


@pytest.mark.parametrize("k", [2, 5, 32])
@pytest.mark.parametrize("vocab", VOCABS[1:])
def test_statistics_of_other_k(vocab, k):
    check_statistics(random_logits(2, vocab), [1, vocab - 1], k)


@pytest.mark.parametrize("vocab", [20, 21, 31])
def test_vocabularies_hardly_larger_than_k(vocab):
    check_statistics(random_logits(4, vocab), [0, 1, 2, vocab - 1])


def test_statistics_with_default_lanes():
    check_statistics(random_logits(2, 5000), [1, 4999], lanes=2048)


@pytest.mark.parametrize("above", [0, 5, 19])
@pytest.mark.parametrize("where", ["one lane", "many lanes", "neighbours"])
def test_ties_at_the_twentieth_place(where, above):
    """``above`` clear leaders and 30 equal candidates for the places left."""
    logits = random_logits(1, 40 * LANES + 7, 0.5).clamp(max=1.0)
    logits[
        0, {"one lane": slice(5, None, LANES), "many lanes": slice(3, None, 85), "neighbours": slice(90, 120)}[where]
    ] = 2
    logits[0, 200 : 200 + 7 * above : 7] = torch.linspace(3, 4, above)
    check_statistics(logits, [93])


@pytest.mark.parametrize("step", [1, LANES, LANES // 2, LANES + 1], ids=["row", "one lane", "two lanes", "diagonal"])
@pytest.mark.parametrize("first", [0, LANES - 1])
def test_the_top_twenty_wherever_they_lie(first, step):
    """All 20 in one lane, in two, in 20 neighbouring ones; from the first lane on and from the last."""
    logits = random_logits(2, 22 * LANES + 5, 1.0).clamp(max=2.0)
    logits[:, first : first + 20 * step : step] = torch.linspace(5, 7, 20)
    check_statistics(logits, [first, first + 19 * step])


@pytest.mark.parametrize("vocab", VOCABS)
def test_flat_logits_have_entropy_one(vocab):
    nll, entropy = check_statistics(torch.full((2, vocab), -7.0), [3, vocab - 1])
    assert nll.tolist() == pytest.approx([math.log(vocab)] * 2, rel=1e-6) and entropy.tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize("at", [0, LANES, 5 * LANES + 22])
def test_one_dominant_logit_has_entropy_zero(at):
    logits = random_logits(2, VOCABS[-1], 1.0)
    logits[:, at] = 60.0
    assert check_statistics(logits, [at, 7])[1].max() < 1e-6


@pytest.mark.parametrize("offset", [100.0, -100.0])
def test_logits_of_size_100(offset):
    check_statistics(random_logits(2, VOCABS[-1], 2.0) + offset, [1, VOCABS[-1] - 1])
    check_statistics(torch.linspace(offset, -offset, VOCABS[-1]).repeat(2, 1), [0, VOCABS[-1] - 1])


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("lead", [6.0, 12.0, 14.0])
def test_a_sure_target_keeps_the_accuracy_of_one_minus_p(lead, offset):
    """p from 0.5 to 0.9998: the error is one of 1 - p in float32, even where logits of size 100 have ulp 8e-6."""
    logits = random_logits(1, VOCABS[-1], 1.0)
    logits[0, 70] = lead
    logits += offset
    nll, _ = run(statistics.token_statistics, *on(logits, torch.tensor([70])), 20, lanes=LANES)
    assert nll.item() == pytest.approx(exact(logits[0], 70, 20)[0], abs=4 * EPS, rel=1e-6)


@pytest.mark.parametrize("at", [0, 70, 5 * LANES + 22], ids=["first tile", "target", "remainder"])
def test_a_nan_logit_gives_a_nan_nll_to_its_row_only(at):
    logits = random_logits(3, VOCABS[-1])
    logits[1, at] = NAN
    nll, _ = run(statistics.token_statistics, *on(logits, torch.tensor([70, 70, 70])), 20, lanes=LANES)
    assert nll.isnan().tolist() == [False, True, False]


# --- divergence ---------------------------------------------------------------------------------------------------


def check_divergence(base, other, lanes=LANES):
    kl, same = run(divergence.divergence, *on(base, other), lanes=lanes)
    p, q = torch.log_softmax(base.double(), -1), torch.log_softmax(other.double(), -1)
    size = max(base.abs().max().item(), other.abs().max().item()) + math.log(base.shape[1])  # of what is subtracted
    near(
        kl,
        plain_divergence.Reference(base).compare(other)[0],
        (p.exp() * (p - q)).sum(-1),
        slack=2 * EPS * size,
    )
    assert same.dtype == torch.bool and same.tolist() == (base.argmax(-1) == other.argmax(-1)).tolist()
    assert (kl >= 0).all()
    return kl, same


@pytest.mark.parametrize("scale, apart", [(1.0, 0.1), (3.0, 1.0), (30.0, 30.0)])
@pytest.mark.parametrize("vocab", VOCABS)
def test_divergence_of_every_vocabulary(vocab, scale, apart):
    base = random_logits(4, vocab, scale)
    other = base + random_logits(4, vocab, apart, seed=1)
    other[0] = base[0] + random_logits(1, vocab, 1e-3, seed=2)  # the arg-max stays
    other[1, base[1].argmax()] -= 10 * scale  # and here it moves
    _, same = check_divergence(base, other)
    assert same[0] and not same[1]


def test_divergence_with_default_lanes():
    check_divergence(random_logits(2, 2500), random_logits(2, 2500, seed=1), lanes=1024)


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("offset", [0.0, 100.0, -100.0])
def test_identical_logits_diverge_by_nothing(vocab, offset):
    base = random_logits(3, vocab) + offset
    kl, same = run(divergence.divergence, *on(base, base), lanes=LANES)
    assert kl.max() <= 2e-6 and same.all()


@pytest.mark.parametrize("offset", [100.0, -100.0])
def test_a_common_offset_changes_no_divergence(offset):
    base = random_logits(3, VOCABS[-1], 2.0)
    check_divergence(base, base + offset)
    check_divergence(base + offset, random_logits(3, VOCABS[-1], 2.0, seed=1) + offset)


@pytest.mark.parametrize(
    "low, high",
    [(3, 3 + LANES), (3, 9), (9, 3 + LANES), (0, 5 * LANES + 22), (LANES + 1, 3 * LANES)],
    ids=["one lane", "one tile", "lower lane later", "first and last", "across tiles"],
)
def test_the_lowest_of_tied_ids_is_the_arg_max(low, high):
    tied = [low, high]
    base, other = (random_logits(5, VOCABS[-1], 1.0, seed).clamp(max=2.0) for seed in (0, 1))
    for row, (of_base, of_other) in enumerate([(tied, tied), (tied, low), (low, tied), (tied, high), (high, tied)]):
        base[row, of_base] = 5.0
        other[row, of_other] = 6.0
    assert check_divergence(base, other)[1].tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("vocab", VOCABS)
def test_flat_logits_tie_at_the_first_id(vocab):
    base = torch.zeros(2, vocab)
    other = base.clone()
    other[1, vocab - 1] = 1.0
    assert check_divergence(base, other)[1].tolist() == [True, False]


@pytest.mark.parametrize("damaged", ["base", "other"])
def test_a_nan_logit_gives_a_nan_divergence(damaged):
    logits = {"base": random_logits(2, VOCABS[-1]), "other": random_logits(2, VOCABS[-1], seed=1)}
    logits[damaged][1, 70] = NAN
    kl, _ = run(divergence.divergence, *on(logits["base"], logits["other"]), lanes=LANES)
    assert kl.isnan().tolist() == [False, True]


# --- expert activation --------------------------------------------------------------------------------------------

BLOCK = 32
SIZES = [BLOCK - 5, BLOCK, BLOCK + 1, 3 * BLOCK + 7]
LIMIT, ALPHA = 7.0, 1.702


def activate64(gate_up, bias, expert):
    x = gate_up.double() + bias.double()[expert]
    gate, up = x[:, ::2].clamp(max=LIMIT), x[:, 1::2].clamp(-LIMIT, LIMIT)
    return (up + 1) * gate / (1 + torch.exp(-ALPHA * gate))


def check_activation(gate_up, bias, expert, block=BLOCK):
    found = run(expert_activation.activate, *on(gate_up, bias, expert), LIMIT, ALPHA, block=block)
    plain = plain_activation.activate(gate_up, bias, expert, LIMIT, ALPHA)
    near(found, plain, activate64(gate_up, bias, expert))
    return found


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scale", [1.0, 6.0])
@pytest.mark.parametrize("size", SIZES)
def test_activation_of_every_width(size, scale, dtype):
    """With scale 6 a quarter of the values lie beyond the clamps."""
    expert = torch.tensor([2, 0, 1, 2, 2])
    check_activation((normal(5, 2 * size) * scale).to(dtype), normal(3, 2 * size, seed=1).to(dtype), expert)


def test_activation_with_the_default_block():
    check_activation(normal(2, 2500), normal(2, 2500, seed=1), torch.tensor([1, 0]), block=1024)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_clamps(dtype):
    """Gate is clipped from above only, up on both sides, after the bias of 1."""
    gate = torch.tensor([5.5, 6.0, 50.0, 1e4, -8.5, -50.0, -1e4, 1.0, 1.0, 1.0, 1.0])
    up = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 5.5, 50.0, -50.0, -8.5])
    pairs = torch.stack([gate, up], -1).view(1, -1).to(dtype)
    found = check_activation(pairs, torch.ones_like(pairs), torch.tensor([0]), block=4)[0].float()
    assert found[1] == found[2] == found[3]
    assert found[5:7].abs().max() < 1e-30 and found[4] < -1e-7
    assert found[9] == found[10] < 0


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("column", [0, 1, 2 * BLOCK, 2 * BLOCK + 1], ids=["gate", "up", "later gate", "later up"])
def test_a_nan_stays_one_nan(column, dtype):
    gate_up = normal(3, 2 * SIZES[-1]).to(dtype)
    gate_up[1, column] = NAN
    found = run(
        expert_activation.activate,
        *on(gate_up, torch.zeros_like(gate_up), torch.tensor([0, 1, 2])),
        LIMIT, ALPHA, block=BLOCK,
    )  # fmt: skip
    assert found.isnan().nonzero().tolist() == [[1, column // 2]]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scale", [1.0, 6.0])
@pytest.mark.parametrize("size", SIZES)
def test_gradient_of_the_activation(size, scale, dtype):
    """float64's own; with scale 6 many values lie beyond the clamps and get none."""
    gate_up, bias = (normal(5, 2 * size) * scale).to(dtype), normal(3, 2 * size, seed=1).to(dtype)
    expert, arriving = torch.tensor([2, 0, 1, 2, 2]), normal(5, size, seed=2).to(dtype)
    leaf = gate_up.double().requires_grad_()
    truth = torch.autograd.grad(activate64(leaf, bias, expert), leaf, arriving.double())[0]
    args = arriving, gate_up, bias, expert
    found = run(expert_activation.activate_backward, *on(*args), LIMIT, ALPHA, block=BLOCK)
    near(found, plain_activation.activate_backward(*args, LIMIT, ALPHA), truth)
    assert scale == 1.0 or (found == 0).sum() > size / 2
    default = run(expert_activation.activate_backward, *on(*args), LIMIT, ALPHA)
    assert torch.equal(default, found)


# --- expert combination -------------------------------------------------------------------------------------------


def combine64(outputs, row_of_pair, expert, gate, bias):
    tokens, top_k = expert.shape
    combined = torch.zeros(tokens, outputs.shape[1], dtype=torch.float64)
    norm, peak = torch.zeros(2, tokens, top_k, dtype=torch.float64)
    for t in range(tokens):
        for k in range(top_k):
            y = outputs[row_of_pair[t, k]].double() + bias[expert[t, k]].double()
            combined[t] += gate[t, k].double() * y
            norm[t, k], peak[t, k] = y.square().sum().sqrt(), y.abs().max()
    return combined, norm, peak


def pairs(tokens, top_k, size, dtype=FP32, experts=5):
    """Outputs in a random order of pairs, with biases of size 1 and router weights that sum to 1."""
    order = torch.randperm(tokens * top_k, generator=torch.Generator().manual_seed(size)).view(tokens, top_k)
    expert = normal(tokens, experts, seed=2).topk(top_k).indices
    gate = normal(tokens, top_k, seed=3).softmax(-1)
    outputs, bias = normal(tokens * top_k, size).to(dtype), normal(experts, size, seed=1).to(dtype)
    return outputs, order, expert, gate.to(dtype), bias


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("top_k", [1, 3, 4])
@pytest.mark.parametrize("size", SIZES)
def test_combination_of_every_width(size, top_k, dtype):
    args = pairs(6, top_k, size, dtype)
    found = run(expert_combination.combine, *on(*args), True, block=BLOCK)
    for values in zip(found, plain_combination.combine(*args, True), combine64(*args), strict=True):
        near(*values)


def test_combination_with_the_default_block():
    args = pairs(2, 4, 2500)
    found = run(expert_combination.combine, *on(*args), True)
    for values in zip(found, plain_combination.combine(*args, True), combine64(*args), strict=True):
        near(*values)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_combination_without_measures(size, dtype):
    args = pairs(3, 4, size, dtype)
    combined, norm, peak = run(expert_combination.combine, *on(*args), False, block=BLOCK)
    near(combined, plain_combination.combine(*args, False)[0], combine64(*args)[0])
    assert norm is None and peak is None


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("top_k", [1, 3, 4])
@pytest.mark.parametrize("size", SIZES)
def test_gradients_of_the_combination(size, top_k, dtype):
    args = pairs(6, top_k, size, dtype)
    arriving = normal(6, size, seed=4).to(dtype)
    outputs, order, expert, gate, bias = args
    leaves = [x.double().requires_grad_() for x in (outputs, gate)]
    y = leaves[0][order] + bias.double()[expert]
    truth = torch.autograd.grad(torch.einsum("tkh,tk->th", y, leaves[1]), leaves, arriving.double())
    found = run(expert_combination.combine_backward, *on(arriving, *args), block=BLOCK)
    for values in zip(found, plain_combination.combine_backward(arriving, *args), truth, strict=True):
        near(*values)


@pytest.mark.parametrize("column", [0, BLOCK - 1, BLOCK, SIZES[-1] - 1])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_peak_is_seen_in_every_block(column, sign):
    outputs, order, expert, gate, bias = pairs(3, 3, SIZES[-1])
    outputs[order[1, 2], column] = sign * 50.0
    _, norm, peak = run(expert_combination.combine, *on(outputs, order, expert, gate, bias), True, block=BLOCK)
    assert peak[1, 2].item() == abs(sign * 50.0 + bias[expert[1, 2], column]).item()
    assert (peak > 10).sum() == 1 and (norm > 40).sum() == 1


# --- MXFP4 --------------------------------------------------------------------------------------------------------

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
GROUPS = 16


def every_byte(scales):
    """Blocks [16 n, 16] that hold every byte once under each of n scales, and scales [16 n]."""
    scales = torch.as_tensor(scales, dtype=torch.uint8).repeat_interleave(16)
    return torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(len(scales) // 16, 1), scales


def decode(blocks, scales, dtype, groups=GROUPS):
    return run(mxfp4.decode, *on(blocks, scales), dtype, groups=groups)


def same_bits(found, expected):
    integer = torch.int16 if found.dtype == BF16 else torch.int32
    return torch.equal(found.view(integer), expected.view(integer))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_every_byte_is_two_numbers_low_nibble_first(dtype):
    values = decode(*every_byte([127]), dtype)
    expected = torch.tensor([[E2M1[byte % 16], E2M1[byte // 16]] for byte in range(256)], dtype=dtype)
    assert same_bits(values.view(256, 2), expected)


@pytest.mark.parametrize("exponent", [-120, -3, 0, 1, 100])
def test_scales_are_powers_of_two(exponent):
    blocks, scales = every_byte([127 + exponent])
    expected = torch.tensor([[E2M1[byte % 16], E2M1[byte // 16]] for byte in range(256)]).double() * 2.0**exponent
    assert torch.equal(decode(blocks, scales, FP32).view(256, 2).double(), expected)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("scales", [[0, 1], range(2, 253), [253, 254, 255]], ids=["subnormal", "ordinary", "infinite"])
def test_every_byte_under_every_scale_is_bit_equal(scales, dtype):
    if dtype == BF16 and 0 in scales and DEVICE == "cpu":
        pytest.skip("the interpreter has no subnormal bfloat16")
    blocks, exponents = every_byte(list(scales))
    expected = plain_mxfp4.decode(blocks[None], exponents[None], dtype)[0]
    assert same_bits(decode(blocks, exponents, dtype, groups=256).flatten(), expected)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("shape", [(1,), (5,), (GROUPS,), (GROUPS + 1,), (3 * GROUPS + 7,), (2, 3, 9)])
def test_any_number_of_groups(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 150, shape, generator=generator, dtype=torch.uint8)
    expected = plain_mxfp4.decode(blocks[None], scales[None], dtype)[0]
    assert same_bits(decode(blocks, scales, dtype), expected)


# --- attention ----------------------------------------------------------------------------------------------------

SQUARE, WIDE = (16, 16, 4, 2), (64, 32, 4, 3)  # queries, keys, warps, stages
SCALING = 0.25


def softmax_with_sinks(query, key, value, sinks, scaling, window):
    """Every logit, an explicit mask and one more column for the sink, in the arguments' dtype."""
    groups, length = query.shape[2] // key.shape[2], query.shape[1]
    key, value = (x.repeat_interleave(groups, dim=2) for x in (key, value))
    i = torch.arange(length)
    seen = (i[None, :] <= i[:, None]) & (i[None, :] > i[:, None] - window)
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) * scaling
    logits = logits.masked_fill(~seen, float("-inf"))
    column = sinks.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
    weights = torch.cat([logits, column], -1).softmax(-1)[..., :-1]
    return torch.einsum("bhqk,bkhd->bqhd", weights, value)


def attention_inputs(length, batch=1, heads=2, kv_heads=1, dim=16, dtype=FP16):
    """Query, key and value as views of one tensor, as a fused projection leaves them; sinks of size 1."""
    fused = on(normal(batch, length, heads + 2 * kv_heads, dim, seed=length).to(dtype))
    return [*fused.split([heads, kv_heads, kv_heads], dim=2), on(normal(heads, seed=1).to(dtype))]


def check_attention(tensors, window, tile, scaling=SCALING):
    found = run(attention.attention, *tensors, scaling, window, tile=tile)
    tensors = [x.cpu() for x in tensors]
    plain = softmax_with_sinks(*tensors, scaling, window)
    near(found, plain, softmax_with_sinks(*(x.double() for x in tensors), scaling, window))
    assert found.is_contiguous()
    return found


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "tile, length",
    [(SQUARE, n) for n in (1, 9, 16, 17, 32, 41)] + [(WIDE, n) for n in (9, 32, 33, 63, 64, 65, 128, 150)],
)
def test_full_attention_of_every_length(tile, length, dtype):
    check_attention(attention_inputs(length, dtype=dtype), length, tile)


@pytest.mark.parametrize(
    "tile, length, window",
    [(SQUARE, 60, n) for n in (1, 7, 15, 16, 17, 30, 32, 33, 59, 60)]
    + [(WIDE, 150, n) for n in (1, 7, 31, 32, 33, 63, 64, 65, 96, 97, 127, 149, 150, 10_000)],
)
def test_every_window(tile, length, window):
    """Below, equal to and above a tile of keys and of queries, with and without keys that every row sees."""
    check_attention(attention_inputs(length), window, tile)


@pytest.mark.parametrize("length", [9, 16, 40, 64, 100])
@pytest.mark.parametrize("window", [1, 5, 16, 40])
def test_windows_of_short_sequences(length, window):
    check_attention(attention_inputs(length), window, WIDE)


@pytest.mark.parametrize("window", [20, 90])
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (3, 3), (4, 2), (4, 1), (8, 2)])
def test_heads_share_keys_and_batches_do_not(heads, kv_heads, window):
    check_attention(attention_inputs(90, batch=2, heads=heads, kv_heads=kv_heads), window, WIDE)


@pytest.mark.parametrize("dim", [32, 64])
@pytest.mark.parametrize("window", [20, 90])
def test_head_sizes(dim, window):
    check_attention(attention_inputs(90, dim=dim), window, WIDE)


@pytest.mark.parametrize("window", [20, 150])
def test_attention_with_default_tiles(window):
    check_attention(attention_inputs(150, dim=64), window, None)


@pytest.mark.parametrize("layout", ["contiguous", "heads first", "every other head", "slice of the tokens"])
def test_strides(layout):
    batch, length, heads = 2, 40, 2
    query, key, value = (normal(batch, length, heads, 16, seed=seed).half() for seed in range(3))
    views = {
        "contiguous": lambda x: on(x),
        "heads first": lambda x: on(x.transpose(1, 2).contiguous()).transpose(1, 2),
        "every other head": lambda x: on(x.repeat_interleave(2, dim=2))[:, :, ::2],
        "slice of the tokens": lambda x: on(torch.cat([x * NAN, x, x * NAN], 1))[:, length : 2 * length],
    }
    tensors = [views[layout](x) for x in (query, key, value)]
    check_attention([*tensors, on(normal(heads, seed=3).half())], 10, SQUARE)


@pytest.mark.parametrize("window", [1, 20, 150])
def test_the_sink_takes_its_share(window):
    """Equal keys and values of one: the output is n / (n + exp(sink)) for n visible keys."""
    zeros, ones = on(torch.zeros(1, 150, 2, 16).half(), torch.ones(1, 150, 2, 16).half())
    sinks = torch.tensor([-1.0, 1.5]).half()
    found = run(attention.attention, zeros, zeros, ones, on(sinks), SCALING, window, tile=WIDE)
    n = torch.arange(1, 151).clamp(max=window)[:, None]
    torch.testing.assert_close(found[0, :, :, 0].float(), n / (n + sinks.float().exp()), rtol=1e-3, atol=0)


@pytest.mark.parametrize("window", [10, 90])
@pytest.mark.parametrize("sink", [-1e4, -60.0, 60.0, 1e4])
def test_extreme_sinks(sink, window):
    """A sink of 1e4 takes everything, one of -1e4 nothing."""
    *tensors, sinks = attention_inputs(90, batch=2)
    sinks[0] = sink
    found = check_attention([*tensors, sinks], window, WIDE)
    assert (found[:, :, 0] == 0).all() == (sink > 0)


@pytest.mark.parametrize("size", [1e3, -1e3])
def test_large_logits(size):
    """All near 1,000 or -1,000, as is the sink: half precision tells them apart no more, float32 sums do."""
    query, key, value, sinks = (x.cpu() for x in attention_inputs(90))
    query[..., 0], key[..., 0], sinks[0] = 64.0, math.copysign(62.5, size), size
    found = run(attention.attention, *on(query, key, value, sinks), SCALING, 40, tile=WIDE)
    truth = softmax_with_sinks(*(x.double() for x in (query, key, value, sinks)), SCALING, 40)
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=2e-3)


def test_a_nan_key_is_seen_by_its_window_only():
    tensors = attention_inputs(150)
    tensors[1][0, 70, 0, 3] = NAN
    found = run(attention.attention, *tensors, SCALING, 20, tile=WIDE)
    assert found.isnan().any(-1)[0, :, 0].nonzero()[:, 0].tolist() == list(range(70, 90))


# --- rotary embedding ---------------------------------------------------------------------------------------------


def rotate64(x, cos, sin):
    first, second = x.double().chunk(2, dim=-1)
    cos, sin = cos.double()[:, None], sin.double()[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("length, dim", [(1, 16), (7, 32), (5, 64)])
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (3, 1), (5, 3), (6, 2), (8, 4)])
def test_rotation_of_queries_and_keys(heads, kv_heads, length, dim, dtype):
    """Two batches: positions start again in the second."""
    query, key = normal(2, length, heads, dim).to(dtype), normal(2, length, kv_heads, dim, seed=1).to(dtype)
    angle = normal(length, dim // 2, seed=2) * 3
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    plain = apply_rotary_pos_emb(query, key, cos[None], sin[None], unsqueeze_dim=2)
    rotated = run(rotary.rotate, *on(query, key, cos, sin))
    for found, expected, x in zip(rotated, plain, (query, key), strict=True):
        near(found, expected, rotate64(x, cos, sin))


# --- any layout ---------------------------------------------------------------------------------------------------


def scattered(x):
    """The same values in another layout: no two neighbours of a row are neighbours in memory."""
    return x.t().contiguous().t() if x.dim() == 2 else torch.stack([x, x], -1)[..., 0]


def test_no_kernel_takes_a_layout_for_granted():
    logits, other, targets = normal(3, 100), normal(3, 100, seed=1), torch.tensor([5, 6, 99])
    gate_up, bias, expert = normal(6, 64), normal(4, 64), torch.tensor([0, 1, 1, 2, 3, 3])
    ids, gates, order = torch.tensor([[0, 1], [3, 1], [2, 3]]), normal(3, 2).softmax(-1), torch.randperm(6).view(3, 2)
    query, key, cos = normal(2, 5, 4, 16), normal(2, 5, 2, 16), normal(5, 8)
    calls = [
        (lambda *x: statistics.token_statistics(*x, 20, lanes=64), (logits, targets)),
        (lambda *x: divergence.divergence(*x, lanes=64), (logits, other)),
        (lambda *x: expert_activation.activate(*x, 7.0, 1.702), (gate_up, bias, expert)),
        (lambda *x: expert_combination.combine(*x, True), (gate_up, order, ids, gates, bias)),
        (rotary.rotate, (query, key, cos, normal(5, 8, seed=3))),
    ]
    for kernel, tensors in calls:
        expected = kernel(*on(*tensors))
        found = kernel(*(scattered(x) for x in on(*tensors)))
        for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, expected)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
