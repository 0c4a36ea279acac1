"""The training loop: steps, looks at text that is held back, and a state on disk from which a killed run goes on."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from ..engine import forward, ranks
from ..engine.traversal import Traversal
from ..engine.variants import Variant
from ..engine.weights import Weights
from ..errors import ParameterError, ScoringError
from ..files import write_atomically
from ..progress import progress_bar
from ..pruning.criteria import region_bounds
from ..text.packs import Blocks
from .loss import Distillation, Regions
from .trained import Trained

WARM_UP = 0.05  # of the steps
LAST_RATE = 0.02  # of the learning rate, at the end of the cosine
BETAS = (0.9, 0.95)
LARGEST_NORM = 1.0  # of a step's gradient


@dataclass(frozen=True)
class Schedule:
    """How long, on how much at once, and when to look at the text that is held back.

    patience: after so many looks without a better one, training stops.
    """

    steps: int
    batch_blocks: int
    learning_rate: float
    check_every: int
    patience: int
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of a step, from 0: linear warm-up, then half a cosine."""
        warm_up = max(1, round(WARM_UP * self.steps))
        if step < warm_up:
            return self.learning_rate * (step + 1) / warm_up
        done = (step - warm_up) / max(1, self.steps - warm_up)
        return self.learning_rate * (LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * done)))

    def blocks_of(self, step: int, count: int) -> np.ndarray:
        """Ids of a step's blocks: all ``count`` in a random order, then again in another."""
        places = np.arange(step * self.batch_blocks, (step + 1) * self.batch_blocks)
        orders = {e: np.random.default_rng([self.seed, e]).permutation(count) for e in {*(places // count).tolist()}}
        return np.array([orders[place // count][place % count] for place in places.tolist()])


@dataclass(frozen=True)
class Objective:
    """Weights of tokens in the loss: of those that are not kept, and of kept ones by EAFT region."""

    other_weight: float = 0.15
    good: float = 1.0
    uncertain: float = 1.0
    conflict: float = 1.0
    cc_quantile: float = 0.15
    entropy_topk: int = 20

    @property
    def by_region(self) -> bool:
        return {self.good, self.uncertain, self.conflict} != {1.0}


@dataclass(frozen=True)
class Look:
    """The student on the text that is held back, after ``step`` steps.

    loss: mean training loss since the look before; None at the first. kl, ppl: of kept tokens. seconds: of training.
    """

    step: int
    tokens: int
    loss: float | None
    held_out_kl: float
    held_out_ppl: float
    seconds: float


@dataclass
class State:
    """All that a run needs to go on: the looks so far, and tensors by name."""

    curve: list[Look] = field(default_factory=list)
    best: dict[str, torch.Tensor] = field(default_factory=dict)
    moments: dict[str, torch.Tensor] = field(default_factory=dict)
    leaves: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def best_look(self) -> Look:
        return min(self.curve, key=lambda look: look.held_out_kl)

    def save(self, path: Path, identity: dict) -> None:
        from safetensors.torch import save_file

        groups = {"best": self.best, "moments": self.moments, "leaves": self.leaves}
        tensors = {f"{group}/{name}": t.contiguous() for group, named in groups.items() for name, t in named.items()}
        metadata = {"identity": json.dumps(identity), "curve": json.dumps([asdict(look) for look in self.curve])}
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))

    @classmethod
    def load(cls, path: Path) -> tuple["State", dict]:
        """The state, and the identity of the run that left it."""
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            state = cls([Look(**look) for look in json.loads(metadata["curve"])])
            for key in file.keys():
                group, _, name = key.partition("/")
                getattr(state, group)[name] = file.get_tensor(key)
        return state, json.loads(metadata["identity"])


class Recovery:
    """A student that learns from the whole model, through the same weights."""

    def __init__(
        self,
        weights: Weights,
        keep: np.ndarray,
        trained: Trained,
        text: Blocks,
        held_out: Blocks,
        schedule: Schedule,
        objective: Objective,
    ):
        self.weights, self.trained, self.text, self.held_out = weights, trained, text, held_out
        self.schedule, self.objective = schedule, objective
        self.teacher, self.student = Variant(weights), Variant(weights, keep, trained.tensors)
        self.whole_ppl: float | None = None  # the teacher's on the text that is held back, after the first look
        self._regions: Regions | None = None

    def train(self, state: State, save: Callable[[State], object], on_look: Callable[[list[Look]], object]) -> None:
        """Go on from ``state`` until the steps are done or looks stop improving; ``state`` ends with the best leaves.

        Every ``check_every`` steps there is a look, then ``save`` and ``on_look``.
        """
        leaves, schedule = self.trained.leaves, self.schedule
        optimizer = torch.optim.AdamW(
            leaves.values(), betas=BETAS, weight_decay=0.0, fused=self.weights.device.type == "cuda"
        )
        if state.leaves:
            self.trained.set(state.leaves)
            _set_moments(optimizer, leaves, state.moments)
        # A run that goes on looks once more, too: for the whole model's perplexity and the bounds of its regions.
        first = self._look(state.curve[-1].step if state.curve else 0, None, 0.0)
        if not state.curve:
            state.curve.append(first)
            state.best = _copies(leaves)
            on_look(state.curve)
        distillation = Distillation(
            self.weights, self.teacher, self.student, self.objective.other_weight, self._regions
        )
        losses, started, before = [], time.perf_counter(), state.curve[-1].seconds
        start = state.curve[-1].step
        total = (schedule.steps - start) * schedule.batch_blocks * self.text.seq_len
        with progress_bar(total, "recover", "tok", ranks.current()[0] == 0) as advance:
            for step in range(start, schedule.steps):
                if self._is_over(state):
                    break
                losses.append(self.step(step, optimizer, distillation, advance))
                if (step + 1) % schedule.check_every == 0 or step + 1 == schedule.steps:
                    seconds = before + ranks.largest(time.perf_counter() - started)
                    look = self._look(step + 1, float(np.mean(losses)), seconds)
                    losses.clear()
                    if look.held_out_kl < state.best_look.held_out_kl:
                        state.best = _copies(leaves)
                    state.curve.append(look)
                    state.leaves, state.moments = _copies(leaves), _moments(optimizer, leaves)
                    save(state)
                    on_look(state.curve)
        self.trained.set(state.best)

    def _is_over(self, state: State) -> bool:
        return state.curve[-1].step - state.best_look.step >= self.schedule.patience * self.schedule.check_every

    def step(self, step: int, optimizer: torch.optim.Optimizer, distillation: Distillation, advance) -> float:
        """Train on one step's blocks and return its loss; advance: called with the tokens that are done."""
        ids = self.schedule.blocks_of(step, len(self.text.tokens))
        blocks = self.text.take(ids)
        loss, part = torch.zeros((), device=self.weights.device), distillation.on(blocks)

        def counted(*given) -> torch.Tensor:
            value = part(*given)
            loss.add_(value.detach())
            return value

        for tokens in Traversal(self.weights, blocks, [self.teacher, self.student]).backward(counted):
            advance(tokens * ranks.current()[1] / (2 * self.weights.checkpoint.num_layers))
        leaves = list(self.trained.leaves.values())
        add_up_gradients(leaves, loss)
        torch.nn.utils.clip_grad_norm_(leaves, LARGEST_NORM)
        for group in optimizer.param_groups:
            group["lr"] = self.schedule.rate(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not math.isfinite(value := loss.item()):
            raise ScoringError(
                f"step {step}: the loss is {value}, expected a finite number. Lower learning_rate, or run with dtype float32."
            )
        return value

    def _look(self, step: int, loss: float | None, seconds: float) -> Look:
        run = forward.score_variants(
            self.weights,
            self.held_out,
            [self.teacher, self.student],
            base=0,
            entropy_topk=self.objective.entropy_topk,
            progress=False,
        )
        whole, student = run.variants
        if self.whole_ppl is None:
            self.whole_ppl = math.exp(whole.nll.mean(dtype=np.float64))
            self._regions = self._regions_of(whole)
        tokens = step * self.schedule.batch_blocks * self.text.seq_len
        kl, nll = (float(x.mean(dtype=np.float64)) for x in (student.kl_to_base, student.nll))
        return Look(step, tokens, loss, kl, math.exp(nll), seconds)

    def _regions_of(self, whole: forward.TokenStatistics) -> Regions | None:
        """Regions by the whole model's own quantiles, over the text that is held back."""
        o = self.objective
        if not o.by_region:
            return None
        p, h = np.exp(-whole.nll.astype(np.float64)), whole.entropy.astype(np.float64)
        return Regions(*region_bounds(p, h, o.cc_quantile), o.good, o.uncertain, o.conflict, o.entropy_topk)


def add_up_gradients(leaves: list[torch.Tensor], loss: torch.Tensor) -> None:
    """Replace gradients and the loss by their sums over ranks."""
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad  # no block of this rank reached it
    if ranks.current()[1] > 1:
        tensors = [loss, *(leaf.grad for leaf in leaves)]
        flat = torch.cat([t.flatten() for t in tensors]).cpu()
        ranks.add_up([flat])
        for tensor, values in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(values.view_as(tensor))


def hold_back(blocks: Blocks, count: int, eos_token_id: int) -> tuple[Blocks, Blocks]:
    """(all but the last ``count`` blocks, those): a row that reaches into the latter is not scored there.

    Raises ParameterError where that leaves no token to score.
    """
    tokens, kept = blocks.tokens[-count:], blocks.kept[-count:].copy()
    ends = np.flatnonzero(tokens.ravel() == eos_token_id)
    kept.ravel()[: ends[0] + 1 if len(ends) else kept.size] = False
    if not kept.any():
        raise ParameterError(
            f"held_out_blocks: found {count}, in which no assistant's token lies after the end of the first row, so that "
            "there is nothing to judge the training by. Hold back more blocks."
        )
    return blocks.take(slice(None, -count)), replace(blocks.take(slice(-count, None)), kept=kept)


def _copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _moments(optimizer: torch.optim.Optimizer, leaves: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    states = ((name, optimizer.state[leaf]) for name, leaf in leaves.items())
    return _copies({f"{name}/{kind}": value for name, state in states for kind, value in state.items()})


def _set_moments(
    optimizer: torch.optim.Optimizer, leaves: dict[str, torch.Tensor], moments: dict[str, torch.Tensor]
) -> None:
    for name, leaf in leaves.items():
        own = {key.rpartition("/")[2]: value for key, value in moments.items() if key.rpartition("/")[0] == name}
        optimizer.state[leaf] = {kind: value.to(leaf.device, copy=True) for kind, value in own.items()}
