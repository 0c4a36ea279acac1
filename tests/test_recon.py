"""Reconstruction against transformers' own layers with masked routers, and its search against all keep-sets there are."""

import itertools
import json
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import world

from eaftlib.engine import experts, forward, grams, traversal, weights
from eaftlib.engine.placement import place
from eaftlib.engine.weights import Weights
from eaftlib.errors import ParameterError, ScoringError
from eaftlib.evaluation import results
from eaftlib.evaluation.evaluate import evaluate
from eaftlib.model.checkpoint import Checkpoint
from eaftlib.model.families import GptOss
from eaftlib.pruning import recon
from eaftlib.pruning.criteria import expert_sums
from eaftlib.pruning.keepsets import core_experts, from_ranking
from eaftlib.pruning.ranking import ranking_of, read_ranking, write_ranking
from eaftlib.pruning.slicing import prune
from eaftlib.pruning.trace import Trace, record
from eaftlib.text.harmony import completion_spans
from eaftlib.text.packs import pack_blocks

TOKENS = 50
EXPERTS = range(world.EXPERTS)


@pytest.fixture(scope="module")
def blocks(source, tokenizer):
    """13 blocks of 40 tokens, more than are sampled; the last micro-batch of two has only one."""
    found = pack_blocks(source, "UNION", tokenizer, completion_spans, seq_len=40, num_blocks=13)
    assert found.kept.sum() > 1.2 * TOKENS
    return found


def recorded(checkpoint, blocks, placement, share, tokens=TOKENS):
    """A trace, in micro-batches of two blocks and slices of three tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(traversal.MICRO_BATCH_TOKENS, "cpu", 80)
        patch.setitem(grams.PAIRS_AT_ONCE, "cpu", 3 * world.EXPERTS)
        patch.setattr(weights, "RESIDENT_SHARE", share)
        return record(checkpoint, blocks, placement, recon_tokens=tokens, progress=False)[0]


@pytest.fixture(scope="module")
def trace(checkpoint, blocks, cpu):
    return recorded(checkpoint, blocks, cpu, weights.RESIDENT_SHARE)


@pytest.fixture(scope="module")
def inputs(hf_model, blocks):
    """What reaches each layer's experts at the sampled positions: [L, T, H], by transformers."""
    predictors = [(b, t - 1) for b, t in np.argwhere(blocks.kept).tolist()]
    sampled = [predictors[i * len(predictors) // TOKENS] for i in range(TOKENS)]
    seen = []
    hooks = [
        layer.mlp.register_forward_hook(lambda mlp, args, out: seen.append([args[0][b, t] for b, t in sampled]))
        for layer in hf_model.model.layers
    ]
    world.logits(hf_model, blocks.tokens)
    for hook in hooks:
        hook.remove()
    return torch.stack([torch.stack(layer) for layer in seen])


def triangle(matrices):
    i, j = zip(*((i, j) for i in range(matrices.shape[1]) for j in range(i, matrices.shape[1])), strict=True)
    return matrices[:, i, j]


@torch.no_grad()
def test_grams_and_logits_are_those_of_transformers_modules(trace, hf_model, inputs):
    assert trace.grams.shape == (world.LAYERS, TOKENS, world.EXPERTS * (world.EXPERTS + 1) // 2)
    for layer, x, found, logits in zip(hf_model.model.layers, inputs, trace.grams, trace.router_logits, strict=True):
        np.testing.assert_allclose(logits, layer.mlp.router(x)[0], rtol=1e-3, atol=1e-4)
        one = torch.ones(TOKENS, 1)
        outputs = [layer.mlp.experts(x, torch.full((TOKENS, 1), e), one).double() for e in EXPERTS]
        outputs = torch.stack(outputs, dim=1)
        np.testing.assert_allclose(found, triangle(outputs @ outputs.mT), rtol=1e-3, atol=1e-3 * found.max())


def test_streamed_layers_give_what_resident_ones_give(trace, checkpoint, blocks, cpu):
    streamed = recorded(checkpoint, blocks, cpu, 0)
    np.testing.assert_array_equal(streamed.grams, trace.grams)
    np.testing.assert_array_equal(streamed.router_logits, trace.router_logits)


def test_a_sample_leaves_the_rest_of_the_trace_as_it_is(trace, checkpoint, blocks, cpu):
    plain = recorded(checkpoint, blocks, cpu, weights.RESIDENT_SHARE, tokens=0)
    assert plain.grams is None and plain.router_logits is None and "recon_tokens" not in plain.provenance
    for name in ("nll", "entropy", "expert", "gate", "norm", "peak"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(trace, name))


def test_a_trace_with_grams_is_read_back_whole(trace, tmp_path):
    trace.save(tmp_path / "t.safetensors")
    again = Trace.load(tmp_path / "t.safetensors")
    np.testing.assert_array_equal(again.grams, trace.grams)
    np.testing.assert_array_equal(again.router_logits, trace.router_logits)
    assert again.provenance["recon_tokens"] == again.provenance["recon_tokens_found"] == TOKENS


def test_where_memory_is_short_a_micro_batch_is_computed_again(trace, checkpoint, blocks, cpu, monkeypatch):
    real, seen = grams.upper_triangles, []

    def short(outputs):
        seen.append(len(outputs))
        if len(seen) == 5:  # not the first slice of its micro-batch, so that half of its rows are written
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(outputs)

    monkeypatch.setattr(grams, "upper_triangles", short)
    with pytest.warns(UserWarning, match="going on with 1 blocks"):
        found = recorded(checkpoint, blocks, cpu, weights.RESIDENT_SHARE)
    assert seen[4] == 3 and max(seen[5:]) == 1
    np.testing.assert_allclose(found.grams, trace.grams, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.router_logits, trace.router_logits, rtol=1e-4, atol=1e-4)


def test_layers_are_afterwards_as_they_were(checkpoint, blocks, cpu):
    opened = Weights(checkpoint, cpu)
    forward.score(opened, blocks, gram_tokens=9, progress=False)
    for _, layer in opened.layers():
        assert not hasattr(layer.mlp.experts, "watch") and not layer.mlp.router._forward_hooks


def test_only_layers_with_experts_are_watched(trace, checkpoint, blocks, cpu, monkeypatch):
    monkeypatch.setattr(GptOss, "moe_layers", lambda self, config: [1, 3])
    found = recorded(checkpoint, blocks, cpu, weights.RESIDENT_SHARE)
    assert not found.grams[[0, 2]].any() and not found.router_logits[[0, 2]].any()
    np.testing.assert_array_equal(found.grams[[1, 3]], trace.grams[[1, 3]])
    nothing = recon.reconstruct(found.grams[:1], found.router_logits[:1], world.TOP_K, progress=False)[0]
    assert nothing.ranking.tolist() == [*EXPERTS] and not nothing.scores.any() and not any(nothing.losses.values())


@pytest.mark.parametrize("tokens", [1, 7, 50, 10_000])
def test_sampled_positions_predict_kept_tokens_and_are_spread_evenly(blocks, tokens):
    sampled = np.argwhere(grams.sampled_positions(blocks, tokens)).tolist()
    predictors = [[b, t - 1] for b, t in np.argwhere(blocks.kept).tolist()]
    assert len(sampled) == min(tokens, len(predictors))
    places = [predictors.index(position) for position in sampled]
    gaps = np.diff([*places, len(predictors)])
    assert places[0] == 0 and gaps.max() - gaps.min() <= 1


def test_outputs_of_all_experts_by_grouped_products():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    module = SimpleNamespace(num_experts=5, limit=7.0, alpha=1.702)
    module.gate_up_proj, module.gate_up_proj_bias = normal(5, 8, 16), normal(5, 16)
    module.down_proj, module.down_proj_bias = normal(5, 8, 8), normal(5, 8)
    hidden = normal(3, 8)
    found = grams.outputs_of_all(partial(experts.grouped, module), hidden, 5)
    for t, e in itertools.product(range(3), range(5)):
        gate, up = (hidden[t] @ module.gate_up_proj[e] + module.gate_up_proj_bias[e]).view(8, 2).T
        h = (up.clamp(-7, 7) + 1) * gate.clamp(max=7) * torch.sigmoid(1.702 * gate.clamp(max=7))
        expected = h @ module.down_proj[e] + module.down_proj_bias[e]
        torch.testing.assert_close(found[t, e], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 0.1)])
def test_a_gpu_records_what_the_cpu_does(trace, checkpoint, blocks, dtype, tolerance):
    found = record(checkpoint, blocks, place("cuda", dtype), recon_tokens=TOKENS, progress=False)[0]
    for name in ("grams", "router_logits"):
        a, b = getattr(found, name), getattr(trace, name)
        assert a.dtype == np.float32 and np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), name


# --- the loss -----------------------------------------------------------------------------------------------------


def kept(ids, size):
    return np.isin(np.arange(size), ids)


@torch.no_grad()
def losses_by_transformers(mlp, x):
    """{ids: sum over tokens of the squared change of a layer's output}, its router masked; all keep-sets."""
    whole, bias = mlp(x[None])[0].double(), mlp.router.bias.clone()
    found = {(): whole.square().sum().item()}
    for size in range(world.TOP_K, world.EXPERTS + 1):
        for ids in itertools.combinations(EXPERTS, size):
            mlp.router.bias.copy_(bias.masked_fill(torch.from_numpy(~kept(ids, world.EXPERTS)), float("-inf")))
            found[ids] = (mlp(x[None])[0].double() - whole).square().sum().item()
            mlp.router.bias.copy_(bias)
    return found


@pytest.mark.parametrize("index", range(world.LAYERS))
def test_the_loss_of_every_keep_set_is_that_of_a_layer_with_a_masked_router(trace, hf_model, inputs, index):
    expected = losses_by_transformers(hf_model.model.layers[index].mlp, inputs[index])
    layer = recon.Layer(trace.grams[index], trace.router_logits[index], world.TOP_K)
    assert len(expected) == 1 + sum(1 for n in EXPERTS if n >= 1 for _ in itertools.combinations(EXPERTS, n + 1))
    energy = expected.pop(())
    np.testing.assert_allclose(layer.energy.sum(), energy, rtol=1e-4)
    found = [recon.KeptExperts(layer, kept(ids, world.EXPERTS)).loss for ids in expected]
    np.testing.assert_allclose(found, list(expected.values()), rtol=1e-3, atol=1e-6 * energy)
    assert max(expected.values()) > 0.1 * energy


def made_up(seed, num_experts=7, tokens=60, width=5):
    """(grams, logits, outputs [T, E, H]) of experts about as popular as each other, whose outputs vary less than they do."""
    rng = np.random.default_rng(seed)
    logits = 1.5 * rng.normal(size=(tokens, num_experts)) + 0.3 * rng.normal(size=num_experts)
    logits = logits.astype(np.float32)
    outputs = 2 * rng.normal(size=(1, num_experts, width)) + 0.5 * rng.normal(size=(tokens, num_experts, width))
    outputs = outputs.astype(np.float32)
    return triangle(outputs @ outputs.transpose(0, 2, 1)), logits, outputs


@cache
def losses_by_loop(seed, top_k):
    """{ids: share of the energy lost}, token by token, all keep-sets down to a single expert."""
    _, logits, outputs = made_up(seed)

    def output(t, ids):
        best = sorted(ids, key=lambda e: (-logits[t, e], e))[:top_k]
        gates = np.exp(logits[t, best].astype(float) - logits[t, best].max())
        return gates / gates.sum() @ outputs[t, best].astype(float)

    size = logits.shape[1]
    whole = [output(t, range(size)) for t in range(len(logits))]
    energy = sum(y @ y for y in whole)
    sets = [ids for n in range(1, size + 1) for ids in itertools.combinations(range(size), n)]
    changes = {ids: [output(t, ids) - y for t, y in enumerate(whole)] for ids in sets}
    return {ids: sum(d @ d for d in change) / energy for ids, change in changes.items()}


SEEDS = range(20)
top_ks = pytest.mark.parametrize("top_k", [1, 2, 3])


@top_ks
@pytest.mark.parametrize("seed", range(3))
def test_losses_after_drops_and_swaps_equal_a_loop(seed, top_k):
    """Whatever set they start from, and after each drop and swap that only some tokens see."""
    expected, size = losses_by_loop(seed, top_k), 7
    layer = recon.Layer(*made_up(seed)[:2], top_k)
    rng = np.random.default_rng(seed)
    for count in range(top_k, size):
        experts_kept = recon.KeptExperts(layer, np.ones(size, bool))
        for expert in rng.permutation(size)[: size - count]:
            experts_kept.drop(expert)
        for _ in range(4):
            ids = np.flatnonzero(experts_kept.kept)
            lost = experts_kept.loss / layer.energy.sum()
            assert lost == pytest.approx(expected[tuple(ids.tolist())], rel=1e-5, abs=1e-7)
            drops, swaps = (
                found / layer.energy.sum() for found in (experts_kept.after_drops(), experts_kept.after_swaps())
            )
            assert np.isfinite(drops).sum() == count and np.isfinite(swaps).sum() == count * (size - count)
            for out in ids if count > 1 else ():
                wanted = expected[tuple(sorted({*ids.tolist()} - {out}))]
                assert drops[out] == pytest.approx(wanted, rel=1e-5, abs=1e-7)
            for out, into in itertools.product(ids, np.flatnonzero(~experts_kept.kept)):
                wanted = expected[tuple(sorted({*ids.tolist(), into} - {out}))]
                assert swaps[into, out] == pytest.approx(wanted, rel=1e-5, abs=1e-7)
            experts_kept.swap(out, into)


def test_equal_logits_go_to_the_lower_id():
    """bfloat16 logits are often equal; here they are one of three values."""
    gram, logits, _ = made_up(0, num_experts=40)
    logits = np.random.default_rng(0).integers(0, 3, logits.shape).astype(np.float32)
    layer, left = recon.Layer(gram, logits, 4), range(3, 40)
    best = layer.best(kept(left, 40), layer.tokens)
    assert best.T.tolist() == [sorted(left, key=lambda e, z=z: (-z[e], e))[:5] for z in logits]


def test_gates_of_extreme_logits_are_exact():
    """A gap of 60 between first and second: what takes over when the first goes is not lost in rounding."""
    gram, logits, outputs = made_up(1, tokens=1)
    logits[0] = [70, 10, 9, 8, -90, -91, -500]
    layer = recon.Layer(gram, logits, 2)
    first = outputs[0, 0].astype(float)
    gates = np.exp([1.0, 0.0]) / np.exp([1.0, 0.0]).sum()
    second = gates @ outputs[0, 1:3].astype(float)
    assert recon.KeptExperts(layer, kept(range(1, 7), 7)).loss == pytest.approx(
        np.square(first - second).sum(), rel=1e-5
    )
    assert recon.KeptExperts(layer, kept([5, 6], 7)).loss == pytest.approx(
        np.square(first - outputs[0, 5].astype(float)).sum(), rel=1e-5
    )


def test_outputs_that_are_not_finite_are_an_error():
    gram, logits, _ = made_up(0)
    gram[3, 4] = np.inf
    with pytest.raises(ScoringError, match="recon: an expert's output is NaN"):
        recon.Layer(gram, logits, 2)


# --- the search ---------------------------------------------------------------------------------------------------


@cache
def eliminated(seed, top_k):
    return recon.eliminate(recon.Layer(*made_up(seed)[:2], top_k))


def best_of(losses, count):
    return min(loss for ids, loss in losses.items() if len(ids) == count)


@top_ks
@pytest.mark.parametrize("seed", SEEDS)
def test_each_step_of_the_elimination_drops_the_expert_whose_loss_is_least(seed, top_k):
    losses, found = losses_by_loop(seed, top_k), eliminated(seed, top_k)
    left, met = [*range(7)], 0.0
    for expert in found.ranking[:0:-1].tolist():
        after = {e: losses[tuple(i for i in left if i != e)] for e in left}
        assert after[expert] == pytest.approx(min(after.values()), rel=1e-6, abs=1e-7)
        left.remove(expert)
        met = max(met, after[expert])
        assert found.scores[expert] == pytest.approx(met, rel=1e-5, abs=1e-7)
    assert found.scores[left[0]] == pytest.approx(max(met, 1.0))
    assert (np.diff(found.scores[found.ranking]) <= 0).all()


@top_ks
@pytest.mark.parametrize("seed", SEEDS)
def test_no_swap_helps_a_keep_set_and_none_is_worse_than_the_greedy_one(seed, top_k):
    losses, found = losses_by_loop(seed, top_k), eliminated(seed, top_k)
    assert list(found.keep_sets) == list(range(6, top_k - 1, -1))
    for count, ids in found.keep_sets.items():
        ids = tuple(ids.tolist())
        assert len(ids) == count and list(ids) == sorted(set(ids))
        assert found.losses[count] == pytest.approx(losses[ids], rel=1e-5, abs=1e-7)
        assert losses[ids] <= losses[tuple(sorted(found.ranking[:count].tolist()))] + 1e-9
        neighbours = [tuple(sorted({*ids} - {o} | {i})) for o in ids for i in range(7) if i not in ids]
        assert losses[ids] <= min(losses[n] for n in neighbours) + 1e-7


def test_swaps_find_the_best_keep_set_more_often_than_elimination_alone():
    """Of 300 searches (20 layers, by top-k and count) the greedy set is the best of all in 220, the one after swaps in 284."""
    cases = [(seed, top_k, count) for seed in SEEDS for top_k in (1, 2, 3) for count in range(top_k, 7)]
    best = {"greedy": 0, "swapped": 0}
    for seed, top_k, count in cases:
        losses, found = losses_by_loop(seed, top_k), eliminated(seed, top_k)
        for name, ids in (("greedy", np.sort(found.ranking[:count])), ("swapped", found.keep_sets[count])):
            best[name] += losses[tuple(ids.tolist())] <= best_of(losses, count) + 1e-7
            assert best_of(losses, count) <= losses[tuple(ids.tolist())] + 1e-7
    assert len(cases) == 300 and abs(best["greedy"] - 220) <= 2 and best["swapped"] >= 282


def test_a_never_chosen_expert_goes_first_and_a_useless_one_soon():
    gram, logits, _ = made_up(2)
    logits[:, [1, 4]] = -50
    found = recon.eliminate(recon.Layer(gram, logits, 2))
    assert found.ranking[-2:].tolist() == [1, 4] and found.scores[[1, 4]].max() < 1e-6


# --- from a trace to keep-sets ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranking_folder(tmp_path_factory, trace, blocks):
    folder = tmp_path_factory.mktemp("ranking")
    sums = expert_sums(trace, np.ones(blocks.kept.sum()))
    write_ranking(
        folder, ranking_of(trace, sums, ["reap", "recon"], settings=world.RANK_SETTINGS, progress=False), sums
    )
    return folder


def test_a_ranking_file_holds_the_elimination_of_every_layer(ranking_folder, trace):
    content = read_ranking(ranking_folder)
    entry = content["criteria"]["recon"]
    assert list(entry["keep_sets"]) == list(entry["losses"]) == ["7", "6", "5", "4", "3", "2"]
    for index in range(world.LAYERS):
        layer = recon.Layer(trace.grams[index], trace.router_logits[index], world.TOP_K)
        found = recon.eliminate(layer)
        assert entry["ranking"][index] == found.ranking.tolist() and sorted(found.ranking) == [*EXPERTS]
        assert entry["scores"][index] == found.scores.tolist()
        for count, sets in entry["keep_sets"].items():
            loss = recon.KeptExperts(layer, kept(sets[index], world.EXPERTS)).loss / layer.energy.sum()
            assert entry["losses"][count][index] == pytest.approx(loss)
    assert set(content["criteria"]["reap"]) == {"scores", "ranking"}
    assert content["provenance"]["recon_tokens"] == TOKENS and len(content["provenance"]["grams_sha256"]) == 64


def test_the_hash_of_a_ranking_covers_what_recon_came_from(trace, blocks):
    sums = expert_sums(trace, np.ones(blocks.kept.sum()))
    values = vars(trace)
    other = Trace(**values | {"grams": np.nextafter(trace.grams, np.float32(np.inf))})
    a, b = (ranking_of(t, sums, ["recon"], settings={}, progress=False)["provenance"] for t in (trace, other))
    assert a["grams_sha256"] != b["grams_sha256"] and a["sha256"] != b["sha256"]


def test_a_keep_set_by_recon_is_the_one_after_swaps(checkpoint, ranking_folder):
    """Written into the file, so that it cannot be what the ranking alone gives."""
    content = json.loads((ranking_folder / "ranking.json").read_text())
    entry = content["criteria"]["recon"]
    entry["keep_sets"]["4"] = [sorted(layer[-4:]) for layer in entry["ranking"]]
    options = {"ranking": ranking_folder, "criterion": "recon", "multiple_of": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eaftlib.pruning.keepsets.read_ranking", lambda path: content)
        keep = from_ranking(checkpoint, keep_n=4, **options)
        assert keep.ids.tolist() == entry["keep_sets"]["4"] and keep.ids.dtype == np.int64
        assert keep.chosen_by["by"] == "keep_sets" and keep.chosen_by["criterion"] == "recon"
        with_core = from_ranking(checkpoint, keep_n=4, core_top_m=1, **options)
        assert with_core.chosen_by["by"] == "ranking"
        whole = from_ranking(checkpoint, keep_n=8, **options)
        assert whole.mask.all() and whole.chosen_by["by"] == "ranking"
    sums = expert_sums_beside(ranking_folder)
    for ids, order, core in zip(with_core.ids.tolist(), entry["ranking"], core_experts(sums, 1), strict=True):
        (first,) = np.flatnonzero(core).tolist()
        assert ids == sorted([first, *[e for e in order if e != first][:3]])
    by_reap = from_ranking(checkpoint, ranking=ranking_folder, criterion="reap", keep_n=4)
    assert "by" not in by_reap.chosen_by


def expert_sums_beside(folder):
    import pyarrow.parquet as pq

    return pq.read_table(folder / "saliency.parquet")


@pytest.mark.parametrize("keep_n", [2, 5])
def test_a_pruned_checkpoint_scores_like_the_keep_set_by_recon(
    checkpoint, ranking_folder, source, cpu, tmp_path, keep_n
):
    keep = from_ranking(checkpoint, ranking=ranking_folder, criterion="recon", keep_n=keep_n, multiple_of=1)
    prune(checkpoint, keep, tmp_path / "pruned", progress=False)
    options = {"seq_lens": [40], "num_blocks": 4, "only": ["UNION"], "out_dir": tmp_path, "progress": False}
    evaluate(checkpoint, source, cpu, {"virtual": keep}, **options)
    evaluate(Checkpoint(str(tmp_path / "pruned")), source, cpu, {"on-disk": None}, **options)
    virtual, on_disk = (results.read(tmp_path / f"{label}.json") for label in ("virtual", "on-disk"))
    np.testing.assert_allclose(on_disk.tokens("UNION", 40).nll, virtual.tokens("UNION", 40).nll, rtol=1e-4, atol=1e-4)
    assert on_disk.meta["keep_set"] == virtual.meta["keep_set"] == keep.chosen_by


def test_recon_without_a_sample_is_refused(checkpoint, blocks, cpu):
    plain, _ = record(checkpoint, blocks, cpu, progress=False)
    sums = expert_sums(plain, np.ones(blocks.kept.sum()))
    with pytest.raises(ParameterError, match=r"criteria: 'recon' needs Gram matrices .* none of.*recon_tokens"):
        ranking_of(plain, sums, ["reap", "recon"], settings={})


@pytest.mark.parametrize("processes", [1, 2])
def test_more_tokens_than_host_memory_holds_are_refused_before_the_pass(
    checkpoint, blocks, cpu, monkeypatch, processes
):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(grams, "free_bytes", lambda device: 20_000)
    monkeypatch.setattr(Weights, "layers", lambda *a: pytest.fail("the pass began"))
    free = 20_000 // processes  # 4 layers x 50 tokens x 36 pairs x 4 bytes = 28,800
    words = rf"recon_tokens: .* 50 tokens take 0\.0 GB .* Set recon_tokens to {50 * free // 57_600} or less"
    with pytest.raises(ParameterError, match=words):
        record(checkpoint, blocks, cpu, recon_tokens=50, progress=False)


def test_all_experts_are_recorded_for_one_model(checkpoint, blocks, cpu):
    with pytest.raises(ValueError, match="a single keep-set"):
        forward.score(Weights(checkpoint, cpu), blocks, keep_sets=[None, None], gram_tokens=5)
