"""Which experts matter: one pass records what every expert did per token, every criterion is computed from that."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from . import forward
from .checkpoint import Checkpoint
from .devices import Placement
from .errors import ParameterError, ResultError
from .files import write_atomically, write_json
from .launch import over_gpus
from .packs import Blocks
from .weights import Weights

SCHEMA = "eaft-ranking/1"
ALIGNMENTS = ("predictor", "token")


@dataclass(frozen=True)
class RegionWeights:
    """Weight of a token by region (EAFT, arXiv 2601.02151): sure and right, unsure, sure and wrong."""

    good: float = 1.0
    uncertain: float = 0.25
    conflict: float = -2.0


@dataclass(frozen=True)
class Trace:
    """Everything a pass over calibration blocks leaves behind; the model is not needed again.

    nll, entropy float32 [N] per kept token. predictor_row, token_row int64 [N]: the recorded row where the token is
    predicted (position t-1) and where it stands (t). expert uint8, gate, norm, peak float32 [L, R, top_k] per recorded
    row, see ExpertTrace. provenance: what it came from.
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

    @property
    def probability(self) -> np.ndarray:
        return np.exp(-self.nll.astype(np.float64))

    def save(self, path: Path) -> None:
        from safetensors.numpy import save_file

        arrays = {k: v for k, v in vars(self).items() if isinstance(v, np.ndarray)}
        metadata = {"num_experts": str(self.num_experts), "provenance": json.dumps(self.provenance)}
        write_atomically(path, lambda temporary: save_file(arrays, temporary, metadata))

    @classmethod
    def load(cls, path: Path) -> "Trace":
        from safetensors import safe_open

        if not Path(path).is_file():
            raise ResultError(f"{path}: no such trace; run 01_rank, which writes it beside ranking.json")
        with safe_open(path, framework="np") as file:
            metadata = file.metadata()
            arrays = {name: file.get_tensor(name) for name in file.keys()}
        return cls(**arrays, num_experts=int(metadata["num_experts"]), provenance=json.loads(metadata["provenance"]))


@over_gpus
def trace(
    checkpoint: Checkpoint,
    blocks: Blocks,
    placement: Placement,
    *,
    entropy_topk: int = 20,
    progress: bool = True,
) -> tuple[Trace, forward.Pass]:
    """One pass over calibration blocks that records every routed pair."""
    weights = Weights(checkpoint, placement)
    run = forward.score(weights, blocks, entropy_topk=entropy_topk, record_experts=True, progress=progress)
    recorded = forward.recorded_positions(blocks)
    row_of = np.cumsum(recorded.ravel()).reshape(recorded.shape) - 1  # recorded rows in block order
    block, position = np.nonzero(blocks.kept)
    expert, gate, norm, peak = (tensor.numpy() for tensor in run.experts.tensors)
    result = Trace(
        nll=run.variants[0].nll,
        entropy=run.variants[0].entropy,
        predictor_row=row_of[block, position - 1],
        token_row=row_of[block, position],
        expert=expert,
        gate=gate,
        norm=norm,
        peak=peak,
        num_experts=checkpoint.num_experts,
        provenance={
            "model_id": checkpoint.model_id,
            "model_sha256": checkpoint.sha256,
            "tokenizer_sha256": checkpoint.tokenizer_sha256,
            "pack": blocks.pack,
            "rows": blocks.rows,
            "rows_seen": blocks.rows_seen,
            "rows_sha256": blocks.rows_sha256,
            "seq_len": blocks.seq_len,
            "num_blocks": len(blocks.tokens),
            "kept_tokens": int(blocks.kept.sum()),
            "entropy_topk": entropy_topk,
            "device": placement.device.type,
            "dtype": str(placement.dtype).removeprefix("torch."),
        },
    )
    return result, run


def token_weights(trace: Trace, cc_quantile: float, weights: RegionWeights) -> np.ndarray:
    """float64 [N]: good (p >= p_lo, H <= H_lo), conflict (p < p_lo, H <= H_lo), uncertain (the rest).

    p_lo and H_lo are the ``cc_quantile`` quantiles over the trace's tokens.
    """
    p, h = trace.probability, trace.entropy.astype(np.float64)
    p_lo, h_lo = np.quantile(p, cc_quantile), np.quantile(h, cc_quantile)
    sure = h <= h_lo
    return np.where(~sure, weights.uncertain, np.where(p >= p_lo, weights.good, weights.conflict))


def expert_sums(trace: Trace, token_weight: np.ndarray, align: str = "predictor") -> pa.Table:
    """Sums over kept tokens per (layer, expert), float64; the columns of saliency.parquet.

    align: ``predictor`` pairs a token with the routing at the position that predicted it, ``token`` with its own.
    """
    if align not in ALIGNMENTS:
        raise ParameterError(f"align: found {align!r}, expected one of {ALIGNMENTS}")
    rows = trace.predictor_row if align == "predictor" else trace.token_row
    layers, _, top_k = trace.expert.shape
    w = np.repeat(token_weight, top_k)
    tables = []
    for layer in range(layers):
        expert = trace.expert[layer, rows].ravel().astype(np.int64)
        g, n, peak = (getattr(trace, k)[layer, rows].ravel().astype(np.float64) for k in ("gate", "norm", "peak"))

        def total(values=None, expert=expert):
            return np.bincount(expert, values, minlength=trace.num_experts)

        max_activation = np.zeros(trace.num_experts)
        np.maximum.at(max_activation, expert, peak)
        tables.append(
            {
                "layer": np.full(trace.num_experts, layer),
                "expert": np.arange(trace.num_experts),
                "count": total(),
                "gate_sum": total(g),
                "norm_sum": total(n),
                "gate_norm_sum": total(g * n),
                "norm_sq_sum": total(n * n),
                "max_activation": max_activation,
                "eaft_gate_norm_sum": total(w * g * n),
                "pos_gate_norm_sum": total(np.where(w > 0, w, 0) * g * n),
                "neg_gate_norm_sum": total(np.where(w < 0, w, 0) * g * n),
                "pos_count": total(w > 0).astype(np.int64),
                "neg_count": total(w < 0).astype(np.int64),
            }
        )
    return pa.table({name: np.concatenate([t[name] for t in tables]) for name in tables[0]})


# Score of an expert from its sums; sources: REAP arXiv 2510.13999, activation norms and their means arXiv 2606.15716.
CRITERIA = {
    "frequency": lambda s: s["count"].astype(float),
    "gate_mass": lambda s: s["gate_sum"],
    "ean": lambda s: s["norm_sum"],
    "ean_mean": lambda s: _mean(s["norm_sum"], s["count"]),
    "msan": lambda s: _mean(s["norm_sq_sum"], s["count"]),
    "reap": lambda s: _mean(s["gate_norm_sum"], s["count"]),
    "reap_mass": lambda s: s["gate_norm_sum"],
    "eaft_reap": lambda s: s["eaft_gate_norm_sum"],
    "eaft_reap_mean": lambda s: _mean(s["eaft_gate_norm_sum"], s["count"]),
}
RANDOM = "random"


def criterion_scores(sums: pa.Table, criterion: str, seed: int = 0) -> np.ndarray:
    """float64 [L, E], larger is more worth keeping; NaN where a mean has no token to average."""
    columns = sums_by_layer(sums)
    if criterion == RANDOM:
        return np.random.default_rng(seed).random(columns["count"].shape)
    if criterion not in CRITERIA:
        raise ParameterError(f"criteria: found {criterion!r}, expected some of {[*CRITERIA, RANDOM]}")
    return CRITERIA[criterion](columns)


def rank_experts(scores: np.ndarray, routed: np.ndarray | None = None) -> np.ndarray:
    """int64 [L, E]: expert ids best first. Never-routed experts (routed [L, E] false) rank last; ties: lower id first."""
    last = np.zeros(scores.shape, bool) if routed is None else ~routed
    ids = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    return np.lexsort((ids, -np.nan_to_num(scores, nan=-np.inf), last), axis=-1)


def sums_by_layer(sums: pa.Table) -> dict[str, np.ndarray]:
    """Columns of saliency.parquet as [num_layers, num_experts]."""
    layers = sums["layer"].to_numpy()
    num_layers = int(layers.max()) + 1
    return {name: sums[name].to_numpy().reshape(num_layers, -1) for name in sums.column_names}


def ranking_of(trace: Trace, sums: pa.Table, criteria: list[str], *, settings: dict, seed: int = 0) -> dict:
    """The content of ranking.json. settings: the weights, quantile and alignment that ``sums`` were made with."""
    routed = sums_by_layer(sums)["count"] > 0
    entries = {}
    for name in criteria:
        scores = criterion_scores(sums, name, seed)
        ranking = rank_experts(scores, None if name == RANDOM else routed)
        entries[name] = {
            "scores": [[None if np.isnan(x) else float(x) for x in layer] for layer in scores],
            "ranking": ranking.tolist(),
        }
    layers, _, top_k = trace.expert.shape
    provenance = trace.provenance | settings | {"seed": seed, "saliency_sha256": sums_sha256(sums)}
    everything = json.dumps({"provenance": provenance, "criteria": entries}, sort_keys=True)
    provenance["sha256"] = hashlib.sha256(everything.encode()).hexdigest()
    return {
        "schema": SCHEMA,
        "provenance": provenance,
        "num_layers": layers,
        "num_experts": trace.num_experts,
        "top_k": top_k,
        "criteria": entries,
    }


def sums_sha256(sums: pa.Table) -> str:
    """Identifies the sums by their values, whatever file they are in."""
    digest = hashlib.sha256()
    for name in sums.column_names:
        digest.update(name.encode() + sums[name].to_numpy().astype(np.float64).tobytes())
    return digest.hexdigest()


def write_ranking(out_dir: Path, ranking: dict, sums: pa.Table) -> None:
    """ranking.json and saliency.parquet."""
    out_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(
        out_dir / "saliency.parquet", lambda temporary: pq.write_table(sums, temporary, compression="zstd")
    )
    write_json(out_dir / "ranking.json", ranking)


def _mean(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
