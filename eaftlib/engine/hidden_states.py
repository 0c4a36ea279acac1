"""Hidden states that wait between layers: on the device, or in pinned host memory while other blocks are computed."""

import torch


class OnDevice:
    """values: one tensor [blocks, S, H] per model variant."""

    def __init__(self, values: list[torch.Tensor]):
        self.values = values

    def empty_like(self) -> "OnDevice":
        return OnDevice([torch.empty_like(value) for value in self.values])

    def prefetch(self, variant: int, rows: slice) -> None:
        pass

    def fetch(self, variant: int, rows: slice) -> torch.Tensor:
        return self.values[variant][rows]

    def store(self, variant: int, rows: slice, hidden: torch.Tensor) -> None:
        if len(hidden) == len(self.values[variant]):
            self.values[variant] = hidden
        else:
            self.values[variant][rows] = hidden


class InHostMemory:
    """The same over one copy stream, in the order of the calls: a store is always done before a later fetch of it."""

    def __init__(self, values: list[torch.Tensor], device: torch.device):
        """values: pinned host tensors, overwritten by ``store``."""
        self.values, self.device = values, device
        self._stream = torch.cuda.Stream(device)
        self._coming: dict[tuple, tuple[torch.Tensor, torch.cuda.Event]] = {}

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: torch.dtype, variants: int, device: torch.device) -> "InHostMemory":
        return cls([torch.empty(shape, dtype=dtype, pin_memory=True) for _ in range(variants)], device)

    def empty_like(self) -> "InHostMemory":
        first = self.values[0]
        return InHostMemory.empty(first.shape, first.dtype, len(self.values), self.device)

    def prefetch(self, variant: int, rows: slice) -> None:
        """Start the copy that ``fetch`` of the same rows will wait for."""
        with torch.cuda.stream(self._stream):
            arriving = self.values[variant][rows].to(self.device, non_blocking=True)
        arriving.record_stream(torch.cuda.current_stream(self.device))
        self._coming[variant, rows.start, rows.stop] = arriving, self._stream.record_event()

    def fetch(self, variant: int, rows: slice) -> torch.Tensor:
        key = (variant, rows.start, rows.stop)
        if key not in self._coming:
            self._coming.clear()  # what was announced is not what is wanted: the micro-batch has changed
            self.prefetch(variant, rows)
        arrived, event = self._coming.pop(key)
        torch.cuda.current_stream(self.device).wait_event(event)
        return arrived

    def store(self, variant: int, rows: slice, hidden: torch.Tensor) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            self.values[variant][rows].copy_(hidden, non_blocking=True)
        hidden.record_stream(self._stream)
