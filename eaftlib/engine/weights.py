"""A checkpoint's weights on one device: every decoded layer where all fit, else one layer while the next is read."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssDecoderLayer

from ..model.checkpoint import Checkpoint
from .placement import Placement, free_bytes, take

RESIDENT_SHARE = 0.6  # of free memory that decoded layers may take and stay


class Weights:
    """Weights to run blocks through, as often as wanted; what stays on the device stays for all passes.

    resident: whether all decoded layers stay. embedding [V, H] is on the device then, else in host memory.
    lm_head [V, H], norm and rotary are on the device.
    """

    def __init__(self, checkpoint: Checkpoint, placement: Placement):
        self.checkpoint, self.placement = checkpoint, placement
        self.device, self.dtype = device, dtype = placement.device, placement.dtype
        take(placement)
        free = free_bytes(device, placement.max_bytes)
        self.resident = decoded_bytes(checkpoint, dtype) <= RESIDENT_SHARE * free
        self.rotary = checkpoint.rotary(device)
        self.norm = checkpoint.final_norm(device, dtype)
        # A CPU has no product of half-precision inputs into float32 logits, so its head is converted, once.
        self.lm_head = checkpoint.lm_head(device, torch.float32 if device.type == "cpu" else dtype)
        self.embedding = checkpoint.embedding(device if self.resident else torch.device("cpu"), dtype)
        self._kept: list[GptOssDecoderLayer] = []

    def layers(self) -> Iterator[tuple[int, GptOssDecoderLayer]]:
        """(index, layer) in order. A streamed layer is only valid until the next one is asked for: drop it before."""
        count = self.checkpoint.num_layers
        if len(self._kept) == count:
            yield from enumerate(self._kept)
            return
        self._kept.clear()
        for index, layer in enumerate(
            self._read_ahead() if self.device.type == "cuda" else map(self._read, range(count))
        ):
            if self.resident:
                self._kept.append(layer)
            yield index, layer
            del layer  # a streamed layer goes before the next one is decoded

    def router_bias(self, layer: int, keep: np.ndarray | None) -> torch.Tensor:
        """[E]; minus infinity where ``keep`` bool [num_layers, num_experts] is false, so that no token is routed there."""
        bias = self.checkpoint.tensor(f"model.layers.{layer}.mlp.router.bias").to(self.device, self.dtype)
        return bias if keep is None else bias.masked_fill(~torch.from_numpy(keep[layer]).to(self.device), float("-inf"))

    def _read(self, index: int) -> GptOssDecoderLayer:
        with torch.inference_mode():
            return self.checkpoint.layer(index, self.device, self.dtype)

    def _read_ahead(self) -> Iterator[GptOssDecoderLayer]:
        """While one layer computes, a thread reads the next one and decodes it on a stream of its own."""
        stream = torch.cuda.Stream(self.device)

        def read(index: int) -> GptOssDecoderLayer:
            with torch.cuda.stream(stream):
                layer = self._read(index)
            stream.synchronize()
            return layer

        # A thread begins on the first GPU, whichever one this process has.
        with ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(self.device,)) as reader:
            coming = reader.submit(read, 0)
            for index in range(self.checkpoint.num_layers):
                try:
                    layer = coming.result()
                except torch.OutOfMemoryError:  # no room beside the last layer: read it now that that one is gone
                    torch.cuda.empty_cache()
                    layer = read(index)
                if index + 1 < self.checkpoint.num_layers:
                    coming = reader.submit(read, index + 1)
                yield layer
                del layer
                # Its memory may be written on the reader's stream next: nothing may be reading it any more.
                torch.cuda.current_stream(self.device).synchronize()


def decoded_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Bytes of all layers once MXFP4 is decoded to ``dtype``."""
    values = 0
    for name in checkpoint.names:
        if ".layers." in name and not name.endswith("_scales"):
            values += int(np.prod(checkpoint.shape(name))) * (2 if name.endswith("_blocks") else 1)
    return values * dtype.itemsize
