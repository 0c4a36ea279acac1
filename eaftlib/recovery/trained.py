"""What recovery trains: small tensors of a checkpoint, whole or as low-rank updates, rounded as they will be stored."""

from collections.abc import Collection, Iterator, Mapping

import numpy as np
import torch

from ..engine.variants import Changed
from ..errors import ParameterError, ResultError
from ..model.checkpoint import Checkpoint


class Whole(Changed):
    """All of a tensor, as a float32 leaf. The model computes with it rounded to the stored type: writing loses nothing."""

    def __init__(self, stored: torch.Tensor, device: torch.device):
        super().__init__(stored.to(device, torch.float32, copy=True).requires_grad_())
        self._dtype = stored.dtype

    def value(self, stored: torch.Tensor) -> torch.Tensor:
        return self.leaves[0].to(self._dtype)


class LowRank(Changed):
    """The stored matrix [out, in] plus up [out, r] @ down [r, in], rounded to the stored type (LoRA, arXiv 2106.09685).

    ``up`` begins at zero, ``down`` at random values of variance 1 / in.
    """

    def __init__(self, stored: torch.Tensor, rank: int, device: torch.device, generator: torch.Generator):
        out, into = stored.shape
        down = torch.randn(rank, into, generator=generator) * into**-0.5
        self.shape, self._dtype = [out, into], stored.dtype
        self.leaves = [x.to(device).requires_grad_() for x in (torch.zeros(out, rank), down)]

    def value(self, stored: torch.Tensor) -> torch.Tensor:
        up, down = self.leaves
        return (stored.float() + up @ down).to(self._dtype)


class Trained:
    """The tensors of some parts of a model that are trained, by name, as ``Variant`` takes them; float32 on ``device``."""

    def __init__(
        self, checkpoint: Checkpoint, parts: Collection[str], rank: int | None, device: torch.device, seed: int = 0
    ):
        """parts: as ``Family.part_of`` names them. rank: of the update of the attention's matrices; None: trained whole.

        Raises ParameterError for a part that the model does not have.
        """
        self._checkpoint, self.tensors = checkpoint, {}
        generator = torch.Generator().manual_seed(seed)
        found = {name: checkpoint.family.part_of(name) for name in checkpoint.names}
        if lacking := [part for part in parts if part not in found.values()]:
            raise ParameterError(
                f"trained: {checkpoint.model_id} has no {lacking[0]!r} of its own; it has "
                f"{sorted({*found.values()} - {None})}. Leave it out."
            )
        for name, part in found.items():
            if part in parts:
                stored = checkpoint.tensor(name)
                low = rank is not None and part == "attention" and stored.ndim == 2
                self.tensors[name] = LowRank(stored, rank, device, generator) if low else Whole(stored, device)

    @property
    def leaves(self) -> dict[str, torch.Tensor]:
        """What the optimiser changes: a tensor's name, or with ``.up`` and ``.down`` behind it -> float32."""
        named = ((_leaf_names(name, value), value.leaves) for name, value in self.tensors.items())
        return {leaf: tensor for names, tensors in named for leaf, tensor in zip(names, tensors, strict=True)}

    @torch.no_grad()
    def stored(self) -> dict[str, torch.Tensor]:
        """The leaves on the CPU; whole tensors in their stored type, in which nothing of them is lost."""
        found = {}
        for name, value in self.tensors.items():
            kept = [value.value(value.leaves[0])] if isinstance(value, Whole) else value.leaves
            found |= zip(_leaf_names(name, value), (tensor.detach().cpu() for tensor in kept), strict=True)
        return found

    @torch.no_grad()
    def set(self, leaves: Mapping[str, torch.Tensor]) -> None:
        """Take these values. Raises ResultError unless they are exactly the leaves that there are, in their shapes."""
        mine = self.leaves
        different = sorted(mine.keys() ^ leaves.keys()) or [n for n in mine if mine[n].shape != leaves[n].shape]
        if different:
            raise ResultError(
                f"trained tensors: {different[0]!r} is not the same here and there: other parts were trained"
            )
        for name, leaf in mine.items():
            leaf.copy_(leaves[name])

    def parameters(self, keep: np.ndarray) -> int:
        """How many numbers are trained; of removed experts' none is (keep: bool [L, E])."""
        return sum(sum(t.numel() for t in self._rows(name, v.leaves, keep)) for name, v in self.tensors.items())

    @torch.no_grad()
    def final(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, value in the stored type on the CPU) of each tensor, low-rank updates merged."""
        for name, value in self.tensors.items():
            stored = self._checkpoint.tensor(name)
            yield name, value.value(stored.to(value.leaves[0].device)).to("cpu", stored.dtype)

    def _rows(self, name: str, tensors: list[torch.Tensor], keep: np.ndarray) -> list[torch.Tensor]:
        layer = self._checkpoint.family.layer_of_experts(name)
        return tensors if layer is None else [tensor[torch.from_numpy(keep[layer])] for tensor in tensors]


def _leaf_names(name: str, value: Changed) -> list[str]:
    return [f"{name}.up", f"{name}.down"] if isinstance(value, LowRank) else [name]
