"""Attention with sinks as keys against transformers' eager attention with an explicit mask."""

from types import SimpleNamespace

import pytest
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, eager_attention_forward

from eaftlib.engine.attention import FusedAttention, attention_with_sinks

WINDOW = 16


def inputs(length, heads=4, kv_heads=2, head_dim=32, batch=2, sink_scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    tensors = [normal(batch, n, length, head_dim) for n in (heads, kv_heads, kv_heads)]
    return [x.requires_grad_() for x in (*tensors, normal(heads) * sink_scale)]


def visible(length, window):
    """bool [S, S], query by key, written as the two conditions."""
    return torch.tensor([[k <= q and (window is None or k > q - window) for k in range(length)] for q in range(length)])


def eager(query, key, value, sinks, scaling, window):
    module = SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1], sinks=sinks, training=False)
    mask = torch.zeros(query.shape[2], query.shape[2], dtype=query.dtype)
    mask = mask.masked_fill(~visible(query.shape[2], window), float("-inf"))[None, None]
    return eager_attention_forward(module, query, key, value, mask, scaling)[0]


def check(length, window, scaling=0.2, **shape):
    tensors = inputs(length, **shape)
    query, key, value, sinks = tensors
    expected = eager(query, key, value, sinks, scaling, window)
    found, weights = attention_with_sinks(
        None, query, key, value, None, scaling, sliding_window=window, s_aux=sinks, is_causal=True
    )
    assert weights is None and found.shape == expected.shape and found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(1))
    wanted, got = (torch.autograd.grad(out, tensors, upstream, retain_graph=True) for out in (expected, found))
    for name, a, b in zip(("query", "key", "value", "sinks"), got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 48, 75])
def test_values_and_gradients_equal_eager_attention(length, window):
    check(length, window)


@pytest.mark.parametrize("window", [1, 2, 5, 127])
def test_odd_windows(window):
    check(23, window)


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("window", [None, 8])
def test_grouped_heads(heads, kv_heads, window):
    check(21, window, heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize("head_dim", [4, 8, 12, 63, 64])
@pytest.mark.parametrize("window", [None, 8])
def test_head_sizes(head_dim, window):
    check(11, window, head_dim=head_dim, scaling=head_dim**-0.5)


@pytest.mark.parametrize("window", [None, WINDOW])
def test_large_sinks(window):
    check(40, window, sink_scale=30.0)


@pytest.mark.parametrize("window", [None, WINDOW])
def test_the_sink_takes_its_share(window):
    """Equal keys and values of one: the output is n / (n + exp(sink)) for n visible keys."""
    length, sinks = 40, torch.tensor([-1.0, 0.5])
    zeros, ones = torch.zeros(1, 2, length, 8), torch.ones(1, 2, length, 8)
    found = attention_with_sinks(None, zeros, zeros, ones, None, 0.3, sliding_window=window, s_aux=sinks)[0]
    n = torch.arange(1, length + 1).clamp(max=window or length)[:, None]
    torch.testing.assert_close(found[0, :, :, 0], n / (n + sinks.exp()))


@pytest.mark.parametrize("window", [None, WINDOW])
def test_bfloat16_is_no_worse_than_eager_in_bfloat16(window):
    query, key, value, sinks = (x.detach() for x in inputs(75))
    truth = eager(query, key, value, sinks, 0.2, window)
    half = [x.bfloat16() for x in (query, key, value, sinks)]
    plain = eager(*half, 0.2, window)
    found = attention_with_sinks(None, *half[:3], None, 0.2, sliding_window=window, s_aux=half[3])[0]
    assert (found - truth).abs().mean() < 1.5 * (plain - truth).abs().mean()


def test_masks_and_dropout_are_refused():
    query, key, value, sinks = inputs(4)
    for mask, dropout in ((torch.zeros(1, 1, 4, 4), 0.0), (None, 0.1)):
        with pytest.raises(NotImplementedError, match="no attention mask, no dropout"):
            attention_with_sinks(None, query, key, value, mask, 0.2, dropout=dropout, s_aux=sinks)


@pytest.mark.parametrize("layer", [0, 1], ids=["sliding", "full"])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_fused_module_is_transformers_module(checkpoint, layer, transposed):
    """Weights, rotary embedding, sinks and output projection; angles in either layout, as transformers' versions make them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = type(checkpoint.config).from_dict(checkpoint.config.to_dict())
    config._attn_implementation = "eager"
    theirs, ours = GptOssAttention(config, layer), FusedAttention(config, layer)
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    ours.load_state_dict(theirs.state_dict())
    hidden = torch.randn(2, 40, config.hidden_size, generator=generator)
    positions = torch.arange(40)[None]
    cos, sin = checkpoint.family.build_rotary(checkpoint.config)(hidden, positions)
    mask = torch.zeros(40, 40).masked_fill(~visible(40, theirs.sliding_window), float("-inf"))[None, None]
    with torch.inference_mode():
        expected = theirs(hidden, (cos, sin), mask)[0]
        angles = [x.transpose(1, 2).contiguous().transpose(1, 2) if transposed else x for x in (cos, sin)]
        half = [x.to(device, torch.float16) for x in (hidden, *angles)]
        found = ours.to(device, torch.float16)(half[0], tuple(half[1:]))[0].float().cpu()
    assert (found - expected).norm() / expected.norm() < 3e-3
