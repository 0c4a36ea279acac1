"""One pass over calibration text that records what every expert did per token; the model is not needed again."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

from .. import project
from ..engine import forward, ranks
from ..engine.journal import FOLDER, Journal
from ..engine.launch import over_gpus
from ..engine.observers import recorded_positions
from ..engine.placement import Placement
from ..engine.selftest import LONG_TOKENS, selftest
from ..engine.traversal import micro_batches
from ..engine.weights import Weights
from ..errors import ParameterError
from ..files import require_writable_folder, write_atomically
from ..model.checkpoint import Checkpoint
from ..text.packs import Blocks
from .trace_file import TRACE, content_sha256, read_trace


@dataclass(frozen=True)
class Trace:
    """Everything a pass over calibration blocks leaves behind; the model is not needed again.

    nll, entropy float32 [N] per kept token. predictor_row, token_row int64 [N]: the recorded row where the token is
    predicted (position t-1) and where it stands (t). expert (integers), gate, norm, peak float32 [L, R, top_k] per
    recorded row, see ExpertTrace. provenance: what it came from. grams, router_logits: float32, of the sampled tokens,
    where those were asked for, see GramTrace.
    """

    nll: np.ndarray
    entropy: np.ndarray
    predictor_row: np.ndarray
    token_row: np.ndarray
    expert: np.ndarray
    gate: np.ndarray
    norm: np.ndarray
    peak: np.ndarray
    num_experts: int
    provenance: dict
    grams: np.ndarray | None = None
    router_logits: np.ndarray | None = None

    @property
    def probability(self) -> np.ndarray:
        return np.exp(-self.nll.astype(np.float64))

    def save(self, path: Path) -> None:
        from safetensors.numpy import save_file

        arrays = {k: v for k, v in vars(self).items() if isinstance(v, np.ndarray)}
        arrays = {
            name: np.ascontiguousarray(values) for name, values in arrays.items()
        }  # the format writes memory as it is
        metadata = {"num_experts": str(self.num_experts), "provenance": json.dumps(self.provenance)}
        metadata["sha256"] = content_sha256(arrays, metadata)
        write_atomically(path, lambda temporary: save_file(arrays, temporary, metadata))

    @classmethod
    def load(cls, path: Path) -> "Trace":
        """Raises ResultError where it is missing, damaged, or contradicts itself, see trace_file.py."""
        return cls(**read_trace(Path(path)))


@over_gpus(lambda blocks, placement, **_: micro_batches(*blocks.tokens.shape, placement.device))
def record(
    checkpoint: Checkpoint,
    blocks: Blocks,
    placement: Placement,
    *,
    entropy_topk: int = 20,
    recon_tokens: int = 0,
    out_dir: Path | None = None,
    progress: bool = True,
) -> tuple[Trace, forward.Pass]:
    """One pass over calibration blocks that records every routed pair.

    recon_tokens: for the criterion ``recon``, at how many positions to record what all experts would have done. out_dir: where
    ``trace.safetensors`` is written, and, until it is, what a run has finished, so that the same can go on from it. Raises
    ParameterError, before a weight is read, where it cannot be written or the model cannot read so long a block.
    """
    forward.check_request(checkpoint, [blocks.seq_len], entropy_topk)  # before every byte of the weights is hashed
    if out_dir is not None:
        require_writable_folder(out_dir, ParameterError)
    provenance = _provenance(checkpoint, blocks, placement, entropy_topk)
    journal = None if out_dir is None else Journal(out_dir / FOLDER, provenance | _conditions(placement, recon_tokens))
    weights = Weights(checkpoint, placement)
    if blocks.tokens.size >= LONG_TOKENS:
        selftest(weights, blocks, progress)
    run = forward.score(
        weights,
        blocks,
        entropy_topk=entropy_topk,
        record_experts=True,
        gram_tokens=recon_tokens,
        journal=journal,
        progress=progress,
    )
    trace = _trace(run, blocks, checkpoint.num_experts, provenance, recon_tokens)
    if journal and ranks.is_first_on_host():
        trace.save(out_dir / TRACE)
        journal.remove()
    return trace, run


def _trace(run: forward.Pass, blocks: Blocks, num_experts: int, provenance: dict, recon_tokens: int) -> Trace:
    recorded = recorded_positions(blocks)
    row_of = np.cumsum(recorded.ravel()).reshape(recorded.shape) - 1  # recorded rows in block order
    block, position = np.nonzero(blocks.kept)
    expert, gate, norm, peak = (tensor.numpy() for tensor in run.experts.tensors)
    grams, router_logits = (tensor.numpy() for tensor in run.grams.tensors) if run.grams else (None, None)
    sampled = {"recon_tokens": recon_tokens, "recon_tokens_found": grams.shape[1]} if run.grams else {}
    return Trace(
        nll=run.variants[0].nll,
        entropy=run.variants[0].entropy,
        predictor_row=row_of[block, position - 1],
        token_row=row_of[block, position],
        expert=expert,
        gate=gate,
        norm=norm,
        peak=peak,
        num_experts=num_experts,
        provenance=provenance | sampled,
        grams=grams,
        router_logits=router_logits,
    )


def _provenance(checkpoint: Checkpoint, blocks: Blocks, placement: Placement, entropy_topk: int) -> dict:
    return {
        "model_id": checkpoint.model_id,
        "model_sha256": checkpoint.sha256,
        "tokenizer_sha256": checkpoint.tokenizer_sha256,
        "eos_token_id": checkpoint.tokenizer.eos_token_id,
        "pack": blocks.pack,
        "rows": blocks.rows,
        "rows_seen": blocks.rows_seen,
        "rows_sha256": blocks.rows_sha256,
        "seq_len": blocks.seq_len,
        "num_blocks": len(blocks.tokens),
        "kept_tokens": int(blocks.kept.sum()),
        "entropy_topk": entropy_topk,
        "device": placement.device.type,
        "dtype": placement.precision.name,
    }


def _conditions(placement: Placement, recon_tokens: int) -> dict:
    """What a pass depends on besides its provenance."""
    return {
        "recon_tokens": recon_tokens,
        "code_sha256": project.code_sha256(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gpus": forward.gpu_names(placement),
    }
