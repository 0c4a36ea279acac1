"""One pass of a model over blocks: layer by layer, several keep-sets at once, statistics of every kept token."""

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from .checkpoint import Checkpoint
from .errors import ParameterError, ScoringError
from .experts import ExpertProbe
from .kernels import token_statistics as kernel
from .packs import Blocks

MICRO_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
RESIDENT_SHARE = 0.6  # of free memory that decoded weights may take and stay
HOST_SHARE = 0.6  # of free host memory that waiting hidden states may take


@dataclass(frozen=True)
class Placement:
    """Where and in which type a model runs, and why."""

    device: torch.device
    dtype: torch.dtype
    reason: str

    def __str__(self) -> str:
        return f"{self.device}, {str(self.dtype).removeprefix('torch.')} ({self.reason})"


@dataclass(frozen=True)
class TokenStatistics:
    """Per kept token, ordered by block and position: nll and entropy float32 [N].

    kl_to_base float32 [N] and same_top1 bool [N] where the pass also scored the whole model, else None.
    """

    nll: np.ndarray
    entropy: np.ndarray
    kl_to_base: np.ndarray | None = None
    same_top1: np.ndarray | None = None


@dataclass(frozen=True)
class Pass:
    """What one pass over blocks gave: one TokenStatistics per keep-set, and how fast."""

    variants: list[TokenStatistics]
    seconds: float
    tokens_per_second: float  # positions run through the model, all keep-sets together, per second
    peak_device_bytes: int | None


def place(device: str = "auto", dtype: str = "auto") -> Placement:
    """Resolve ``auto``: a GPU where there is one; bfloat16 where the hardware computes it, else float32."""
    reasons = []
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        reasons.append("a GPU is present" if device == "cuda" else "no GPU is present")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ParameterError(f"device: found {device!r}, expected 'auto', 'cpu', 'cuda' or 'cuda:N'")
    resolved = torch.device(device)
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ParameterError(f"device: {device!r} was asked for, but PyTorch sees no GPU. Use 'auto' or 'cpu'.")
    if dtype == "auto":
        if resolved.type == "cpu":
            dtype, why = "float32", "a CPU is exact in it at little cost"
        elif torch.cuda.get_device_capability(resolved) >= (8, 0):
            dtype, why = "bfloat16", "the type the model was published in"
        else:
            dtype, why = "float32", "this GPU lacks bfloat16, and float16 overflows on gpt-oss"
        reasons.append(f"{dtype}: {why}")
    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in types:
        raise ParameterError(f"dtype: found {dtype!r}, expected 'auto' or one of {sorted(types)}")
    return Placement(resolved, types[dtype], "; ".join(reasons) or "as asked")


def score(
    checkpoint: Checkpoint,
    blocks: Blocks,
    placement: Placement,
    *,
    keep_sets: Sequence[np.ndarray | None] = (None,),
    entropy_topk: int = 20,
    probes: list[ExpertProbe] | None = None,
    progress: bool = True,
) -> Pass:
    """Run every block through the model, once per keep-set, and return the statistics of its kept tokens.

    keep_sets: for each variant None (the whole model) or bool [num_layers, num_experts], false where an expert's
    router logit becomes minus infinity. probes: one ExpertProbe per layer, filled for the positions that a kept token or
    its predictor occupies; only with a single keep-set. Raises ScoringError at a token without finite statistics.
    """
    check_request(checkpoint, [blocks.seq_len], entropy_topk)
    if probes is not None and len(keep_sets) != 1:
        raise ValueError("probes measure one model: pass a single keep-set")
    with torch.inference_mode():
        run = _Run(checkpoint, blocks, placement, keep_sets, entropy_topk, probes)
        return run.run(progress)


def check_request(checkpoint: Checkpoint, seq_lens: Iterable[int], entropy_topk: int) -> None:
    """Raises ParameterError for a sequence length or K that the model does not have."""
    longest, vocabulary = checkpoint.config.max_position_embeddings, checkpoint.config.vocab_size
    for length in seq_lens:
        if not 2 <= length <= longest:
            raise ParameterError(f"seq_lens: found {length}, expected 2 to {longest}, the model's longest context")
    if not 2 <= entropy_topk <= vocabulary:
        raise ParameterError(f"entropy_topk: found {entropy_topk}, expected 2 to {vocabulary}, the vocabulary")


def probed_positions(blocks: Blocks) -> np.ndarray:
    """bool [num_blocks, seq_len]: where a kept token stands or is predicted, the positions that probes record."""
    mask = blocks.kept.copy()
    mask[:, :-1] |= blocks.kept[:, 1:]
    return mask


class _Run:
    """State of one pass. A wave of blocks goes through all layers before the next wave starts.

    Where all decoded layers fit they stay, and a wave is one micro-batch. Otherwise a wave is all blocks whose hidden
    states fit into host memory: each layer is read once per wave and every block of it goes through.
    """

    def __init__(self, checkpoint, blocks, placement, keep_sets, entropy_topk, probes):
        self.checkpoint, self.blocks, self.keep_sets = checkpoint, blocks, keep_sets
        self.device, self.dtype = placement.device, placement.dtype
        self.entropy_topk, self.probes = entropy_topk, probes
        self.tokens = torch.from_numpy(blocks.tokens).long()
        self.kept = torch.from_numpy(blocks.kept)
        self.recorded = torch.from_numpy(probed_positions(blocks))
        self.resident = decoded_bytes(checkpoint, self.dtype) <= RESIDENT_SHARE * free_bytes(self.device)
        self.layers: dict = {}
        self.rotary = checkpoint.rotary(self.device)
        self.norm = checkpoint.final_norm(self.device, self.dtype)
        # A CPU has no product of half-precision inputs into float32 logits, so its head is converted, once.
        self.lm_head = checkpoint.lm_head(self.device, torch.float32 if self.device.type == "cpu" else self.dtype)
        self.embedding = checkpoint.embedding(self.device, self.dtype)
        self.biases = [self._masked_biases(layer) for layer in range(checkpoint.num_layers)]

    def run(self, progress: bool) -> Pass:
        per_wave = max(1, MICRO_BATCH_TOKENS[self.device.type] // self.blocks.seq_len)
        batches = torch.arange(len(self.tokens)).split(per_wave)
        waves = self._waves(batches)
        collected: list[list[tuple]] = [[] for _ in self.keep_sets]
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        total = self.tokens.numel() * len(self.keep_sets)
        started = time.perf_counter()
        with _progress_bar(total, self.blocks, len(self.keep_sets), progress) as advance:
            for wave in waves:
                for batch, hidden in self._through_layers(wave, advance):
                    self._collect(batch, hidden, collected)
        seconds = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        return Pass([_concatenate(parts) for parts in collected], seconds, total / seconds, peak)

    def _waves(self, batches: tuple[torch.Tensor, ...]) -> list[list[torch.Tensor]]:
        if self.resident:
            return [[batch] for batch in batches]
        hidden_size = self.checkpoint.config.hidden_size
        batch_bytes = batches[0].numel() * self.blocks.seq_len * hidden_size * self.dtype.itemsize * len(self.keep_sets)
        per_wave = max(1, int(HOST_SHARE * free_bytes(torch.device("cpu")) // batch_bytes))
        return [list(batches[i : i + per_wave]) for i in range(0, len(batches), per_wave)]

    def _through_layers(self, wave: list[torch.Tensor], advance) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
        """(block ids, one hidden state [B, S, H] per variant) for each micro-batch of the wave."""
        parked = self.device if self.resident else torch.device("cpu")
        states = []
        for batch in wave:
            embedded = self.embedding[self.tokens[batch].to(self.device)].to(parked)
            states.append([embedded for _ in self.keep_sets])
        length = self.blocks.seq_len
        positions = torch.arange(length, device=self.device)[None]
        rotary = self.rotary(torch.empty(0, dtype=self.dtype, device=self.device), positions)
        for index in range(self.checkpoint.num_layers):
            layer = self._layer(index)
            for batch, variants in zip(wave, states, strict=True):
                if self.probes is not None:
                    layer.mlp.experts.probe = self.probes[index]
                    self.probes[index].rows = self.recorded[batch].flatten().to(self.device)
                for v, bias in enumerate(self.biases[index]):
                    layer.mlp.router.bias.data = bias
                    hidden = variants[v].to(self.device)
                    variants[v] = layer(hidden, position_ids=positions, position_embeddings=rotary).to(parked)
                    advance(batch.numel() * length / self.checkpoint.num_layers)
            layer.mlp.experts.probe = None
            del layer  # a streamed layer goes before the next one is decoded
        for batch, variants in zip(wave, states, strict=True):
            yield batch, [self.norm(hidden.to(self.device)) for hidden in variants]

    def _collect(self, batch: torch.Tensor, hidden: list[torch.Tensor], collected: list[list[tuple]]) -> None:
        """Statistics of a micro-batch's kept tokens, a slice of tokens at a time, appended per variant."""
        kept = self.kept[batch]
        predictors = kept.roll(-1, dims=1)  # position 0 is never kept, so nothing wraps around
        targets = self.tokens[batch][kept].to(self.device)
        selected = [h[predictors.to(self.device)] for h in hidden]
        rows = kernel.slice_rows(self.checkpoint.config.vocab_size, self.device)
        base = next((v for v, keep in enumerate(self.keep_sets) if keep is None), None)
        compare = base is not None and len(self.keep_sets) > 1
        where = torch.stack([batch[kept.nonzero()[:, 0]], kept.nonzero()[:, 1]], dim=1)
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            reference = None
            order = sorted(range(len(selected)), key=lambda v: v != base)  # the base first
            for v in order:
                logits = kernel.logits_of(selected[v][part], self.lm_head)
                nll, entropy = kernel.token_statistics(logits, targets[part], self.entropy_topk)
                _require_finite(nll, entropy, where[part])
                entry = (nll, entropy)
                if compare:
                    reference = reference or kernel.Reference(logits)
                    entry += reference.compare(logits)
                collected[v].append(tuple(x.cpu() for x in entry))

    def _layer(self, index: int):
        if index in self.layers:
            return self.layers[index]
        layer = self.checkpoint.layer(index, self.device, self.dtype)
        if self.resident:
            self.layers[index] = layer
        return layer

    def _masked_biases(self, layer: int) -> list[torch.Tensor]:
        bias = self.checkpoint.tensor(f"model.layers.{layer}.mlp.router.bias").to(self.device, self.dtype)
        masks = (None if keep is None else torch.from_numpy(keep[layer]).to(self.device) for keep in self.keep_sets)
        return [bias if mask is None else bias.masked_fill(~mask, float("-inf")) for mask in masks]


def decoded_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Bytes of all layers once MXFP4 is decoded to ``dtype``."""
    values = 0
    for name in checkpoint.names:
        if ".layers." in name and not name.endswith("_scales"):
            values += int(np.prod(checkpoint.shape(name))) * (2 if name.endswith("_blocks") else 1)
    return values * dtype.itemsize


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reusable
    import psutil

    return psutil.virtual_memory().available


@contextmanager
def _progress_bar(total: int, blocks: Blocks, variants: int, shown: bool):
    from tqdm import tqdm

    name = f"{blocks.pack} {blocks.seq_len}" + (f" x {variants} models" if variants > 1 else "")
    with tqdm(total=total, desc=name, unit="tok", unit_scale=True, disable=not shown, mininterval=0.5) as bar:
        yield lambda tokens: bar.update(
            min(tokens, total - bar.n)
        )  # shares of layers add up past the total by rounding


def _require_finite(nll: torch.Tensor, entropy: torch.Tensor, where: torch.Tensor) -> None:
    bad = ~(torch.isfinite(nll) & torch.isfinite(entropy))
    if bad.any():
        first = int(bad.nonzero()[0])
        block, position = where[first].tolist()
        raise ScoringError(
            f"block {block}, position {position}: nll {nll[first].item()}, entropy {entropy[first].item()}; expected "
            f"finite values ({int(bad.sum())} bad tokens in this slice). The weights hold NaN or Inf, or {nll.dtype} "
            "overflowed: verify the checkpoint, or run with dtype float32."
        )


def _concatenate(parts: list[tuple]) -> TokenStatistics:
    return TokenStatistics(*(torch.cat(column).numpy() for column in zip(*parts, strict=True)))
