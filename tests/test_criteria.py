"""Saliency against transformers' modules run with hooks and summed token by token, expert by expert, in Python."""

import math
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import world

from eaftlib.engine import experts, forward, traversal
from eaftlib.engine.weights import Weights
from eaftlib.errors import ParameterError, ResultError
from eaftlib.kernels import token_statistics as kernel
from eaftlib.pruning.criteria import RegionWeights, criterion_scores, expert_sums, rank_experts, token_weights
from eaftlib.pruning.ranking import ranking_of, write_ranking
from eaftlib.pruning.trace import Trace, record

WEIGHTS = RegionWeights(good=1.0, uncertain=0.25, conflict=-2.0)
COLUMNS = (
    "layer expert count gate_sum norm_sum gate_norm_sum norm_sq_sum max_activation eaft_gate_norm_sum "
    "pos_gate_norm_sum neg_gate_norm_sum pos_count neg_count"
).split()


@pytest.fixture(scope="module", params=["resident", "streamed"])
def trace(request, checkpoint, blocks, cpu):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(traversal.MICRO_BATCH_TOKENS, "cpu", 80)
        patch.setattr(kernel, "slice_rows", lambda vocab, device: 7)
        if request.param == "streamed":
            patch.setattr("eaftlib.engine.weights.RESIDENT_SHARE", 0)
        yield record(checkpoint, blocks, cpu, progress=False)[0]


@pytest.fixture(scope="module")
def routed(hf_model, blocks):
    """routed[layer][block][position]: list of (expert, gate, norm, peak), each expert applied by hand to its input."""
    seen = []

    def hook(mlp, args, output):
        x = args[0].flatten(0, 1)
        logits = torch.nn.functional.linear(x, mlp.router.weight, mlp.router.bias)
        top, ids = logits.topk(world.TOP_K, dim=-1)
        gates, experts = top.double().softmax(-1), mlp.experts
        tokens = []
        for t in range(len(x)):
            pairs = []
            for j, g in zip(ids[t].tolist(), gates[t].tolist(), strict=True):
                gate_up = x[t] @ experts.gate_up_proj[j] + experts.gate_up_proj_bias[j]
                gate, up = gate_up[0::2].clamp(max=7), gate_up[1::2].clamp(-7, 7)
                out = ((up + 1) * gate * torch.sigmoid(1.702 * gate)) @ experts.down_proj[j] + experts.down_proj_bias[j]
                pairs.append((j, g, math.sqrt(sum(v * v for v in out.tolist())), max(map(abs, out.tolist()))))
            tokens.append(pairs)
        seen.append([tokens[i : i + blocks.seq_len] for i in range(0, len(tokens), blocks.seq_len)])

    hooks = [layer.mlp.register_forward_hook(hook) for layer in hf_model.model.layers]
    world.logits(hf_model, blocks.tokens)
    for handle in hooks:
        handle.remove()
    return seen


def sums_by_loop(routed, blocks, weights, align):
    rows = {(layer, e): dict.fromkeys(COLUMNS[2:], 0.0) for layer in range(world.LAYERS) for e in range(world.EXPERTS)}
    kept = [(b, t) for b in range(len(blocks.kept)) for t in range(blocks.seq_len) if blocks.kept[b, t]]
    for (b, t), w in zip(kept, weights, strict=True):
        for layer in range(world.LAYERS):
            for expert, g, n, peak in routed[layer][b][t - 1 if align == "predictor" else t]:
                row = rows[layer, expert]
                row["count"] += 1
                row["gate_sum"] += g
                row["norm_sum"] += n
                row["gate_norm_sum"] += g * n
                row["norm_sq_sum"] += n * n
                row["max_activation"] = max(row["max_activation"], peak)
                row["eaft_gate_norm_sum"] += w * g * n
                row["pos_gate_norm_sum"] += g * n if w > 0 else 0
                row["neg_gate_norm_sum"] += g * n if w < 0 else 0
                row["pos_count"] += w > 0
                row["neg_count"] += w < 0
    return rows


@pytest.mark.parametrize("align", ["predictor", "token"])
def test_every_column_equals_a_loop_over_tokens_and_experts(trace, routed, blocks, align):
    weights = np.random.default_rng(0).choice([1.0, 0.25, -2.0], blocks.kept.sum())
    sums = expert_sums(trace, weights, align)
    assert sums.column_names == COLUMNS
    expected = sums_by_loop(routed, blocks, weights, align)
    assert list(zip(sums["layer"].to_pylist(), sums["expert"].to_pylist(), strict=True)) == list(expected)
    for name in COLUMNS[2:]:
        wanted = [row[name] for row in expected.values()]
        tolerance = 0 if name.endswith("count") else 2e-4
        np.testing.assert_allclose(sums[name].to_numpy(), wanted, rtol=tolerance, atol=tolerance, err_msg=name)


def test_the_two_alignments_differ(trace, blocks):
    ones = np.ones(blocks.kept.sum())
    a, b = (expert_sums(trace, ones, align)["count"].to_numpy() for align in ("predictor", "token"))
    assert a.sum() == b.sum() == blocks.kept.sum() * world.LAYERS * world.TOP_K and (a != b).any()


def test_a_trace_scores_tokens_as_a_plain_pass_does(trace, checkpoint, blocks, cpu):
    plain = forward.score(Weights(checkpoint, cpu), blocks, progress=False).variants[0]
    np.testing.assert_allclose(trace.nll, plain.nll, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(trace.entropy, plain.entropy, rtol=1e-5, atol=1e-5)


def test_provenance_names_everything_the_trace_came_from(trace, checkpoint, blocks):
    expected = {
        "model_sha256": checkpoint.sha256,
        "tokenizer_sha256": checkpoint.tokenizer_sha256,
        "eos_token_id": 1,
        "pack": "UNION",
        "rows": "all",
        "rows_seen": blocks.rows_seen,
        "rows_sha256": blocks.rows_sha256,
        "seq_len": 40,
        "num_blocks": 5,
        "kept_tokens": int(blocks.kept.sum()),
    }
    assert expected.items() <= trace.provenance.items()


def test_a_saved_trace_is_read_back_whole(trace, tmp_path):
    trace.save(tmp_path / "t.safetensors")
    again = Trace.load(tmp_path / "t.safetensors")
    for name, value in vars(trace).items():
        if isinstance(value, np.ndarray):
            assert getattr(again, name).dtype == value.dtype
            np.testing.assert_array_equal(getattr(again, name), value)
        else:
            assert getattr(again, name) == value
    with pytest.raises(ResultError, match=r"u\.safetensors does not exist; run 01_rank"):
        Trace.load(tmp_path / "u.safetensors")


def quantile(values, q):
    """Linear interpolation between order statistics."""
    values = sorted(values)
    at = q * (len(values) - 1)
    low = math.floor(at)
    high = min(low + 1, len(values) - 1)
    return values[low] + (at - low) * (values[high] - values[low])


def stand_in(nll, entropy):
    return SimpleNamespace(probability=np.exp(-np.array(nll)), entropy=np.array(entropy, np.float32))


def test_token_weights_by_region_by_hand():
    p = [0.1, 0.5, 0.9, 0.2, 0.05]
    h = [0.1, 0.1, 0.9, 0.2, 0.9]
    # The medians are p 0.2 and H 0.2: sure and wrong, sure and right, unsure, on both lines (good), unsure and wrong.
    assert token_weights(stand_in(-np.log(p), h), 0.5, WEIGHTS).tolist() == [-2.0, 1.0, 0.25, 1.0, 0.25]


@pytest.mark.parametrize("cc_quantile", [0.05, 0.15, 0.5, 0.9])
def test_token_weights_against_the_definition(trace, cc_quantile):
    p, h = [math.exp(-x) for x in trace.nll.tolist()], trace.entropy.tolist()
    p_lo, h_lo = quantile(p, cc_quantile), quantile(h, cc_quantile)
    weights = RegionWeights(good=3.0, uncertain=0.5, conflict=-7.0)
    found = token_weights(trace, cc_quantile, weights)
    assert found.tolist() == [(3.0 if a >= p_lo else -7.0) if b <= h_lo else 0.5 for a, b in zip(p, h, strict=True)]


def hand_sums():
    """One layer: expert 2 was never routed, 0 and 3 are equal."""
    columns = {
        "layer": [0, 0, 0, 0],
        "expert": [0, 1, 2, 3],
        "count": [4, 2, 0, 4],
        "gate_sum": [2.0, 0.5, 0.0, 2.0],
        "norm_sum": [12.0, 10.0, 0.0, 12.0],
        "gate_norm_sum": [6.0, 5.0, 0.0, 6.0],
        "norm_sq_sum": [40.0, 60.0, 0.0, 40.0],
        "max_activation": [1.0, 9.0, 0.0, 1.0],
        "eaft_gate_norm_sum": [-1.0, 3.0, 0.0, -1.0],
        "pos_gate_norm_sum": [1.0, 3.0, 0.0, 1.0],
        "neg_gate_norm_sum": [-2.0, 0.0, 0.0, -2.0],
        "pos_count": [3, 2, 0, 3],
        "neg_count": [1, 0, 0, 1],
    }
    return pa.table(columns)


@pytest.mark.parametrize(
    "criterion, scores, ranking",
    [
        ("frequency", [4, 2, 0, 4], [0, 3, 1, 2]),
        ("gate_mass", [2, 0.5, 0, 2], [0, 3, 1, 2]),
        ("ean", [12, 10, 0, 12], [0, 3, 1, 2]),
        ("ean_mean", [3, 5, None, 3], [1, 0, 3, 2]),
        ("msan", [10, 30, None, 10], [1, 0, 3, 2]),
        ("reap", [1.5, 2.5, None, 1.5], [1, 0, 3, 2]),
        ("reap_mass", [6, 5, 0, 6], [0, 3, 1, 2]),
        ("eaft_reap", [-1, 3, 0, -1], [1, 0, 3, 2]),  # never routed comes after a negative score
        ("eaft_reap_mean", [-0.25, 1.5, None, -0.25], [1, 0, 3, 2]),
    ],
)
def test_every_criterion_by_hand(criterion, scores, ranking):
    trace = SimpleNamespace(expert=np.zeros((1, 1, 2)), num_experts=4, provenance={})
    content = ranking_of(trace, hand_sums(), [criterion], settings={})
    assert content["criteria"][criterion] == {"scores": [scores], "ranking": [ranking]}


def test_ties_rank_by_lower_id_in_every_layer():
    scores = np.array([[1.0, 2.0, 2.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert rank_experts(scores).tolist() == [[1, 2, 4, 0, 3], [0, 1, 2, 3, 4]]


def test_random_is_seeded_and_differs_between_layers(trace, blocks):
    sums = expert_sums(trace, np.ones(blocks.kept.sum()))
    a, b, c = (rank_experts(criterion_scores(sums, "random", seed)) for seed in (1, 1, 2))
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    assert len({tuple(layer) for layer in a.tolist()}) > 1


def test_unknown_criterion_and_alignment_are_refused(trace, blocks):
    with pytest.raises(ParameterError, match=r"criteria: found 'reep', expected some of .*'reap'"):
        criterion_scores(hand_sums(), "reep")
    with pytest.raises(ParameterError, match="align: found 'next'"):
        expert_sums(trace, np.ones(blocks.kept.sum()), "next")


def test_ranking_files_hold_the_fixed_names(trace, blocks, tmp_path):
    sums = expert_sums(trace, np.ones(blocks.kept.sum()))
    ranking = ranking_of(trace, sums, ["reap", "random"], settings={"align": "predictor"}, seed=3)
    write_ranking(tmp_path / "run", ranking, sums)
    read = world.json.loads((tmp_path / "run" / "ranking.json").read_text())
    assert {"schema", "provenance", "num_layers", "num_experts", "top_k", "criteria"} == set(read)
    assert (read["num_layers"], read["num_experts"], read["top_k"]) == (world.LAYERS, world.EXPERTS, world.TOP_K)
    for layer in read["criteria"]["reap"]["ranking"]:
        assert sorted(layer) == list(range(world.EXPERTS))
    assert pq.read_table(tmp_path / "run" / "saliency.parquet").column_names == COLUMNS
    other = ranking_of(trace, sums, ["reap"], settings={"align": "token"}, seed=3)
    assert other["provenance"]["sha256"] != ranking["provenance"]["sha256"]


@pytest.mark.parametrize("num_experts", [256, 257, 300])
def test_expert_ids_beyond_a_byte_are_recorded(num_experts):
    """300 experts, one a token: ids above 255 must neither wrap around nor be sorted as if they had."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randperm(num_experts, generator=generator)[:, None]
    hidden = torch.randn(num_experts, 8, generator=generator)
    module = SimpleNamespace(num_experts=num_experts, limit=7.0, alpha=1.702)
    module.gate_up_proj, module.down_proj = (
        torch.randn(num_experts, *s, generator=generator) for s in ((8, 16), (8, 8))
    )
    module.gate_up_proj_bias, module.down_proj_bias = torch.zeros(num_experts, 16), torch.zeros(num_experts, 8)
    trace = experts.ExpertTrace.empty(1, num_experts, 1, num_experts, torch.device("cpu"))
    module.probe = experts.ExpertProbe(trace, 0, 0, torch.arange(num_experts))
    found = experts.measured(experts.grouped)(module, hidden, ids, torch.ones(num_experts, 1))
    assert torch.equal(trace.expert[0].long(), ids)
    for token, expert in enumerate(ids[:, 0]):
        gate, up = (hidden[token] @ module.gate_up_proj[expert]).view(8, 2).T
        h = (up.clamp(-7, 7) + 1) * gate.clamp(max=7) * torch.sigmoid(1.702 * gate.clamp(max=7))
        torch.testing.assert_close(found[token], h @ module.down_proj[expert], rtol=1e-4, atol=1e-4)
