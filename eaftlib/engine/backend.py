"""Which functions compute a pass: resolved once from the device, the types and the purpose, or forced by name."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.integrations.moe import ExpertsInterface
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRMSNorm

from ..errors import ParameterError
from ..kernels import divergence, mxfp4, token_statistics
from . import attention, experts
from .placement import Placement

NAMES = ("auto", "fused", "turing", "plain")


def _rms_norm(norm: GptOssRMSNorm) -> nn.RMSNorm:
    """The same function as one of PyTorch's kernels."""
    return nn.RMSNorm(norm.weight.shape, norm.variance_epsilon, device=norm.weight.device)


@dataclass(frozen=True)
class Backend:
    """The functions of a pass.

    training: whether gradients can flow. attention, experts: names in transformers' interfaces. modules: for each module
    class that a layer may hold, what is put in its place. decode: as ``kernels.mxfp4.decode``. token_statistics: as
    ``kernels.token_statistics.token_statistics``. reference: as ``kernels.divergence.Reference``.
    """

    name: str = "plain"
    training: bool = False
    attention: str = attention.NAME
    experts: str = experts.BY_EXPERT
    modules: Mapping[type, Callable[[Any], nn.Module]] = field(default_factory=lambda: {GptOssRMSNorm: _rms_norm})
    decode: Callable = mxfp4.decode
    token_statistics: Callable = token_statistics.token_statistics
    reference: Callable = divergence.Reference

    def configure(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """A copy of the configuration whose layers call this backend's attention and experts."""
        config = copy.deepcopy(config)
        config._attn_implementation, config._experts_implementation = self.attention, self.experts
        return config

    def fit(self, layer: nn.Module) -> None:
        """Exchange a layer's modules, before it has weights."""
        for name, module in list(layer.named_children()):
            if type(module) in self.modules:
                setattr(layer, name, self.modules[type(module)](module))


def resolve(placement: Placement, config: PreTrainedConfig, training: bool = False) -> Backend:
    """The backend that a placement names; ``auto``: ``turing`` for float16, else ``fused``, where they run.

    fused: Triton kernels, on NVIDIA GPUs from Ampere on (capability 8.0); float32 keeps PyTorch's attention and experts.
    For training, those without gradients serve the models that only run beside the trained one. turing: products by cuBLAS
    and PyTorch's attention, Triton between them, from Volta on (7.0); float16 only. plain: PyTorch alone, anywhere.
    Raises ParameterError where the named one cannot serve, and for training in float16.
    """
    name, device, is_half = placement.backend, placement.device, placement.precision.is_half
    if name not in NAMES:
        raise ParameterError(f"backend: found {name!r}, expected one of {NAMES}")
    if is_half and training:
        raise ParameterError("dtype: found 'float16', which has no gradients here; expected 'float32' or 'bfloat16'")
    if name == ("fused" if is_half else "turing"):
        raise ParameterError(
            f"backend: {name!r} does not compute in {placement.precision.name}; 'turing' is for float16, 'fused' for the others"
        )
    needed = (7, 0) if is_half else (8, 0)
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= needed
    if name in ("fused", "turing") and not able:
        raise ParameterError(
            f"backend: {name!r} needs an NVIDIA GPU of capability {needed[0]}.{needed[1]} or more; found {device}. Use 'auto' "
            "or 'plain'."
        )
    if is_half:
        return _half(able and name != "plain")
    return _fused(placement, config, training) if able and name != "plain" else Backend(training=training)


def _half(on_gpu: bool) -> Backend:
    """Products of float16 operands; on_gpu: Triton kernels between them, else the plain ones."""
    plain = Backend()
    if not on_gpu:
        by = partial(experts.halves, between=experts.Between())
        ExpertsInterface.register(experts.HALVES, experts.measured(by))
        return replace(
            plain, experts=experts.HALVES, modules=plain.modules | {GptOssAttention: attention.HalfAttention.of}
        )
    from ..kernels.fused import divergence, expert_activation, expert_combination, mxfp4, rotary, token_statistics

    by = partial(experts.halves, between=experts.Between.of(expert_activation, expert_combination))
    ExpertsInterface.register(f"{experts.HALVES}_turing", experts.measured(by))
    attend = partial(attention.HalfAttention.of, rotate=rotary.rotate)
    return Backend(
        name="turing",
        experts=f"{experts.HALVES}_turing",
        modules=plain.modules | {GptOssAttention: attend},
        decode=mxfp4.decode,
        token_statistics=token_statistics.token_statistics,
        reference=divergence.Reference,
    )


def _fused(placement: Placement, config: PreTrainedConfig, training: bool) -> Backend:
    from ..kernels.fused import divergence, expert_activation, expert_combination, mxfp4, token_statistics

    plain, products = Backend(), placement.precision.products
    modules, by = dict(plain.modules), plain.experts
    if products.itemsize == 2 and config.head_dim in attention.FusedAttention.HEAD_DIMS:
        modules[GptOssAttention] = attention.FusedAttention.of
    if products == torch.bfloat16:
        by = experts.GROUPED
        between = experts.Between.of(expert_activation, expert_combination)
        ExpertsInterface.register(by, experts.measured(partial(experts.grouped, between=between)))
    return Backend(
        name="fused",
        training=training,
        experts=by,
        modules=modules,
        decode=mxfp4.decode,
        token_statistics=token_statistics.token_statistics,
        reference=divergence.Reference,
    )
