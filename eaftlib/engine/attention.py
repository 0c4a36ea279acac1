"""Attention with sinks and sliding windows that never builds an S x S mask.

Half precision on a GPU goes through one fused kernel (``FusedAttention``). Everywhere else, and where gradients are
wanted, it is written with PyTorch's own attention:

gpt-oss adds one learned logit per head, the sink, to every softmax and then drops its probability. Here the sink is one
more key with a zero value: each query gets an extra coordinate ``sink / scaling``, the sink's key is the unit vector of
that coordinate, all other keys have zero there. What remains is ordinary attention, so PyTorch's fused kernels apply on
any device, with gradients. Full layers use the causal kernel. Sliding layers cut queries into chunks of one window, each
of which sees its own and the previous chunk's keys: work is linear in the sequence.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention

from ..kernels import rotary
from .half import Narrowing, multiply

NAME = "sinks_as_keys"
_ALIGNMENT = 8  # fused kernels want head sizes in multiples of 8


class FusedAttention(GptOssAttention):
    """transformers' module with one kernel for the rotary embedding and one for all of the attention.

    Serves whole, unpadded sequences that start at position 0, in half precision. Where gradients are wanted, it is
    transformers' module.
    """

    HEAD_DIMS = (16, 32, 64, 128)

    @classmethod
    def of(cls, stock: GptOssAttention) -> "FusedAttention":
        """What takes the place of transformers' module in a layer that has no weights yet."""
        with torch.device("meta"):
            return cls(stock.config, stock.layer_idx)

    def forward(self, hidden_states, position_embeddings, **more):
        """hidden_states [B, S, H], position_embeddings (cos, sin) each [1, S, D / 2] -> ([B, S, H], None)."""
        if torch.is_grad_enabled():
            return super().forward(hidden_states, position_embeddings, **more)
        from ..kernels.fused.attention import attention
        from ..kernels.fused.rotary import rotate

        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (proj(hidden_states).view(shape) for proj in (self.q_proj, self.k_proj, self.v_proj))
        cos, sin = position_embeddings
        query, key = rotate(query, key, cos[0], sin[0])
        output = attention(query, key, value, self.sinks, self.scaling, self.sliding_window or query.shape[1])
        return self.o_proj(output.flatten(2)), None


class HalfAttention(GptOssAttention):
    """transformers' module with float16 operands in all of its products; float32 hidden states come and go.

    On a GPU the products of queries, keys and values are PyTorch's memory-efficient kernel's, which Turing has too.
    """

    narrowing: Narrowing
    rotate = staticmethod(rotary.rotate)

    @classmethod
    def of(cls, stock: GptOssAttention, rotate: Callable = rotary.rotate) -> "HalfAttention":
        """What takes the place of transformers' module in a layer that has no weights yet; rotate: as ``kernels.rotary``'s."""
        with torch.device("meta"):
            module = cls(stock.config, stock.layer_idx)
        module.rotate = rotate
        return module

    def forward(self, hidden_states, position_embeddings, **_):
        """hidden_states [B, S, H], position_embeddings (cos, sin) each [1, S, D / 2] -> ([B, S, H], None)."""
        x = self.narrowing.narrow("hidden states entering attention", hidden_states.flatten(0, 1))
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (_project(proj, x).view(shape) for proj in (self.q_proj, self.k_proj, self.v_proj))
        cos, sin = position_embeddings
        query, key = self.rotate(query, key, cos[0], sin[0])
        named = (("queries", query), ("keys", key), ("values", value))
        heads = [self.narrowing.narrow(name, x).transpose(1, 2) for name, x in named]
        if any(x.dtype == torch.float32 for x in heads):
            heads = [x.float() for x in heads]
        if heads[0].is_cuda:  # with a mask or without, this kernel takes no groups of heads
            heads[1:] = [x.repeat_interleave(heads[0].shape[1] // x.shape[1], dim=1) for x in heads[1:]]
        sinks = self.sinks.to(heads[0].dtype)
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            output, _ = attention_with_sinks(self, *heads, None, self.scaling, 0.0, self.sliding_window, sinks)
        return _project(self.o_proj, output.flatten(0, 1).flatten(1)).view(hidden_states.shape), None


def _project(linear: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return multiply(x, linear.weight.T).add_(linear.bias)


def attention_with_sinks(
    module, query, key, value, attention_mask, scaling, dropout=0.0, sliding_window=None, s_aux=None, **_
):
    """transformers' attention interface for whole, unpadded sequences that start at position 0.

    query [B, Hq, S, D], key and value [B, Hkv, S, D], s_aux [Hq] the sinks. Returns ([B, S, Hq, D], None).
    attention_mask and dropout must be absent: blocks are dense and scored in evaluation mode.
    """
    if attention_mask is not None or dropout:
        raise NotImplementedError("sinks_as_keys serves dense causal blocks only: no attention mask, no dropout")
    head_dim = query.shape[-1]
    query = _append_coordinate(query, (s_aux / scaling).view(1, -1, 1, 1))
    key, value = _append_coordinate(key, 0.0), _append_coordinate(value, 0.0)
    sink_key = torch.zeros_like(key[:, :, :1])
    sink_key[..., head_dim] = 1.0
    if sliding_window is None or sliding_window >= query.shape[2]:
        output = _causal(query, key, value, sink_key, scaling)
    else:
        output = _sliding(query, key, value, sink_key, scaling, sliding_window)
    return output[..., :head_dim].transpose(1, 2).contiguous(), None


def _append_coordinate(x: torch.Tensor, coordinate) -> torch.Tensor:
    padding = _ALIGNMENT - x.shape[-1] % _ALIGNMENT
    padded = F.pad(x, (0, padding))
    if torch.is_tensor(coordinate):
        padded[..., x.shape[-1]] = coordinate.squeeze(-1).to(x.dtype)
    return padded


def _causal(query, key, value, sink_key, scaling):
    if query.is_cuda and query.dtype == torch.float32:  # no fused kernel takes groups of heads in float32
        groups = query.shape[1] // key.shape[1]
        key, value, sink_key = (x.repeat_interleave(groups, dim=1) for x in (key, value, sink_key))
    # A query of zeros in front keeps "query i sees keys 0..i" true after the sink is put in front of the keys.
    output = F.scaled_dot_product_attention(
        F.pad(query, (0, 0, 1, 0)),
        torch.cat([sink_key, key], dim=2),
        F.pad(value, (0, 0, 1, 0)),
        is_causal=True,
        scale=scaling,
        enable_gqa=True,
    )
    return output[:, :, 1:]


def _sliding(query, key, value, sink_key, scaling, window):
    batch, heads, length, _ = query.shape
    key, value, sink_key = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value, sink_key))
    chunks = -(-length // window)
    tail = chunks * window - length
    query, key, value = (F.pad(x, (0, 0, 0, tail)) for x in (query, key, value))

    def chunked(x):  # [B, H, chunks * window, D] -> [B * chunks, H, window, D]
        return x.unflatten(2, (chunks, window)).transpose(1, 2).flatten(0, 1)

    def with_previous(x, first):  # keys or values of the sink, the previous and the own chunk
        previous = F.pad(x, (0, 0, window, 0))[:, :, : chunks * window]
        first = first.repeat_interleave(chunks, dim=0)
        return torch.cat([first, chunked(previous), chunked(x)], dim=2)

    output = F.scaled_dot_product_attention(
        chunked(query),
        with_previous(key, sink_key),
        with_previous(value, torch.zeros_like(sink_key)),
        attn_mask=_window_mask(chunks, window, query.device).repeat(batch, 1, 1, 1),
        scale=scaling,  # grouped heads were repeated above: the fused kernels with a mask do not take groups
    )
    output = output.unflatten(0, (batch, chunks)).transpose(1, 2).flatten(2, 3)
    return output[:, :, :length]


def _window_mask(chunks: int, window: int, device: torch.device) -> torch.Tensor:
    """[chunks, 1, window, 1 + 2 * window]: the sink, and the last ``window`` keys up to the query's own position."""
    q = torch.arange(window, device=device)[:, None]
    k = torch.arange(2 * window, device=device)[None, :]
    inside = (k > q) & (k <= q + window)
    mask = torch.cat([torch.ones_like(inside[:, :1]), inside], dim=1).repeat(chunks, 1, 1, 1)
    mask[0, :, :, 1 : 1 + window] = False  # nothing precedes the first chunk
    return mask


AttentionInterface.register(NAME, attention_with_sinks)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
