"""A checkpoint's weights on one device: every decoded layer where all fit, else one layer while the next is read."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ..model import values
from ..model.checkpoint import Checkpoint
from . import backend, half
from .attention import HalfAttention
from .placement import Placement, free_bytes, take

RESIDENT_SHARE = 0.6  # of free memory that decoded layers may take and stay


@dataclass
class Room:
    """What passes over the weights have found there is memory for, so that the next need not run out of it again.

    tokens: at most so many at once; None: nothing was short yet. for_graphs: whether, in training, what all layers computed
    can wait for its gradient.
    """

    for_graphs: bool
    tokens: int | None = None


class Weights:
    """Weights to run blocks through, as often as wanted; what stays on the device stays for all passes.

    training: choose functions with gradients; the weights themselves never require any. resident: whether all decoded
    layers stay. embedding [V, H] is on the device then, else in host memory. lm_head [V, H], norm and rotary are on the
    device.
    """

    def __init__(self, checkpoint: Checkpoint, placement: Placement, *, training: bool = False):
        self.checkpoint, self.placement, self.precision = checkpoint, placement, placement.precision
        self.device, self.family = placement.device, checkpoint.family
        self.backend = backend.resolve(placement, checkpoint.config, training)
        self._config = self.backend.configure(checkpoint.config)
        take(placement)
        free = free_bytes(self.device, placement.max_bytes)
        self.resident = decoded_bytes(checkpoint, self.precision.products) <= RESIDENT_SHARE * free
        self.rotary = self.family.build_rotary(checkpoint.config).to(self.device)
        self.norm = self._final_norm()
        tied = checkpoint.config.tie_word_embeddings
        head = self.family.embedding if tied else self.family.lm_head
        self.lm_head = checkpoint.tensor(head).to(self.device, self.precision.head)
        if self.precision.head == half.HALF and not torch.isfinite(self.lm_head).all():
            self.lm_head = checkpoint.tensor(head).to(self.device, torch.float32)
        waits_on = self.device if self.resident else torch.device("cpu")
        self.embedding = checkpoint.tensor(self.family.embedding).to(waits_on, self.precision.residual)
        self.room = Room(for_graphs=self.resident)
        self._kept: dict[int, nn.Module] = {}
        self._narrowings = [half.Narrowing(index) for index in range(checkpoint.num_layers)]

    def layers(self, backwards: bool = False) -> Iterator[tuple[int, nn.Module]]:
        """(index, layer) in order. A streamed layer is only valid until the next one is asked for: drop it before."""
        order = range(self.checkpoint.num_layers)[:: -1 if backwards else 1]
        if len(self._kept) == len(order):
            yield from ((index, self._kept[index]) for index in order)
            return
        self._kept.clear()
        indices = iter(order)
        for layer in self._read_ahead(order) if self.device.type == "cuda" else map(self._read, order):
            index = next(indices)  # zip and enumerate would hold on to the layer that they gave last
            if self.resident:
                self._kept[index] = layer
            yield index, layer
            del layer  # a streamed layer goes before the next one is decoded

    def _final_norm(self) -> nn.Module:
        norm = self.family.build_final_norm(self.checkpoint.config)
        norm.weight.data = self.checkpoint.tensor(self.family.final_norm)
        return norm.to(self.device, self.precision.residual).requires_grad_(False)

    @torch.inference_mode(False)  # resident layers outlive this pass, and the next one may want gradients
    @torch.no_grad()
    def _read(self, index: int) -> nn.Module:
        layer = self.family.build_layer(self._config, index)
        self.backend.fit(layer)
        operands = _operands(layer)

        def cast(name: str, stored: torch.Tensor) -> torch.Tensor:
            return self._operand(stored) if name in operands else stored.to(self.precision.residual)

        state = self.family.layer_state(layer, index, self.checkpoint.names, self._fetch, self._decoded, cast)
        layer.load_state_dict(state, assign=True)
        if self.precision.is_half:
            self._guard(layer, index)
        return layer.eval().requires_grad_(False)

    def _operand(self, stored: torch.Tensor) -> torch.Tensor:
        return half.narrowed_weight(stored) if self.precision.is_half else stored.to(self.precision.products)

    def _decoded(self, blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        fits = not self.precision.is_half or half.fits_half(scales)
        return self.backend.decode(blocks, scales, self.precision.products if fits else torch.float32)

    def _guard(self, layer: nn.Module, index: int) -> None:
        """Have products of float16 operands looked after."""
        narrowing = self._narrowings[index]
        for module in layer.modules():
            if isinstance(module, HalfAttention):
                module.narrowing = narrowing
        if index in self.family.moe_layers(self.checkpoint.config):
            self.family.experts(layer).narrowing = narrowing
        narrowing.guard(layer)

    def _fetch(self, name: str) -> torch.Tensor:
        on_gpu = self.device.type != "cpu"
        # From pinned memory a GPU fetches by itself, at full speed and while it computes.
        tensor = self.checkpoint.tensor(name, pinned=on_gpu)
        values.require_finite(name, tensor)  # a gate or up bias that is infinite would be clamped to a number
        return tensor.to(self.device, non_blocking=on_gpu)

    def _read_ahead(self, order: Sequence[int]) -> Iterator[nn.Module]:
        """While one layer computes, a thread reads the next one and decodes it on a stream of its own."""
        stream = torch.cuda.Stream(self.device)

        def read(index: int) -> nn.Module:
            with torch.cuda.stream(stream):
                layer = self._read(index)
            stream.synchronize()
            return layer

        # A thread begins on the first GPU, whichever one this process has.
        with ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(self.device,)) as reader:
            coming = reader.submit(read, order[0])
            for index, following in zip(order, [*order[1:], None], strict=True):
                try:
                    layer = coming.result()
                except torch.OutOfMemoryError:  # no room beside the last layer: read it now that that one is gone
                    torch.cuda.empty_cache()
                    layer = read(index)
                if following is not None:
                    coming = reader.submit(read, following)
                yield layer
                # Once it is dropped the reader, which may be at work on the next one, takes its memory and writes there on
                # a stream of its own: what was launched on this layer must have ended before, not only been launched.
                torch.cuda.current_stream(self.device).synchronize()
                del layer


def _operands(layer: nn.Module) -> set[str]:
    """Names of the parameters that large products take: linear layers' weights, and the experts' matrices [E, ., .]."""
    linear = {f"{name}.weight" for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    return linear | {name for name, parameter in layer.named_parameters() if parameter.dim() == 3}


def decoded_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Bytes of all layers once MXFP4 is decoded to ``dtype``."""
    numbers = 0
    for name in checkpoint.names:
        if ".layers." in name and not name.endswith("_scales"):
            numbers += int(np.prod(checkpoint.shape(name))) * (2 if name.endswith("_blocks") else 1)
    return numbers * dtype.itemsize
