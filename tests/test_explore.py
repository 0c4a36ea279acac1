"""Exploring a stored trace: rankings as 01_rank makes them; losses, masses and overlaps by brute force; the sliders."""

import itertools
import math
import os
import random
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest
import world
import yaml

from eaftlib import params
from eaftlib.errors import ParameterError
from eaftlib.pruning import explore
from eaftlib.pruning.criteria import CRITERIA, expert_sums, token_weights
from eaftlib.pruning.explore import Explorer, Settings, overlap
from eaftlib.pruning.keepsets import choose
from eaftlib.pruning.ranking import ranking_of, write_ranking
from eaftlib.pruning.trace import record
from eaftlib.report import charts, figures
from eaftlib.report.explorer import Panel
from eaftlib.text.harmony import completion_spans
from eaftlib.text.packs import pack_blocks

ROOT = Path(__file__).parents[1]
SEED = 3
TOKENS = 40


@pytest.fixture(scope="module")
def trace(checkpoint, source, tokenizer, cpu):
    blocks = pack_blocks(source, "UNION", tokenizer, completion_spans, seq_len=40, num_blocks=13, rows="calib")
    return record(checkpoint, blocks, cpu, recon_tokens=TOKENS, progress=False)[0]


def ranked(trace, settings, criteria=(*CRITERIA, "random")):
    """What 01_rank makes of a trace: the content of ranking.json, and saliency.parquet."""
    sums = expert_sums(trace, token_weights(trace, settings.cc_quantile, settings.weights), settings.align)
    named = {"packs": "packs", "pack_files": None} | vars(settings)
    return ranking_of(trace, sums, [*criteria], settings=named, seed=SEED, progress=False), sums


@pytest.fixture(scope="module")
def ranking(trace):
    return ranked(trace, Settings(), (*CRITERIA, "random", "recon"))[0]


@pytest.fixture
def explorer(trace, ranking):
    return Explorer(trace, ranking)


WIDE = 0.4  # a quantile at which the trace has tokens of every region
MOVES = [
    Settings(),
    Settings(w_uncertain=0.9),
    Settings(WIDE),
    Settings(WIDE, w_conflict=-1.3),
    Settings(WIDE, w_conflict=-1.3, w_uncertain=0.9),
    Settings(WIDE, w_uncertain=1.0),  # two regions share a weight
    Settings(WIDE, w_good=-2.0),
    Settings(WIDE, w_good=0.5, w_uncertain=0.5, w_conflict=0.5),
    Settings(WIDE, w_good=-0.3, w_uncertain=1.7),  # another order of the weights
    Settings(WIDE, align="token"),
    Settings(WIDE, align="token", w_conflict=0.0),
    Settings(align="token"),
]


def test_the_trace_has_tokens_of_every_region(trace):
    assert set(token_weights(trace, WIDE, Settings().weights)) == {1.0, 0.25, -2.0}


def test_any_way_of_moving_ends_with_the_scores_of_01_rank_to_the_last_bit(trace, explorer):
    order = random.Random(0)
    for settings in [*MOVES, *order.choices(MOVES, k=20)]:
        expected, sums = ranked(trace, settings)
        assert explorer.sums(settings).equals(sums)
        for criterion in (*CRITERIA, "random"):
            assert explorer.choose(settings, criterion, 4).entry == expected["criteria"][criterion]


def test_other_weights_need_no_pass_over_the_trace(explorer, monkeypatch):
    passes = []
    for name in ("plain_sums", "group_sums", "token_weights"):
        original = getattr(explore, name)
        counted = lambda *a, name=name, original=original: passes.append(name) or original(*a)  # noqa: E731
        monkeypatch.setattr(explore, name, counted)
    explorer.sums(Settings())
    assert sorted(passes) == ["group_sums", "plain_sums", "token_weights"]
    for settings in (Settings(w_conflict=-3), Settings(w_good=7, w_uncertain=0.5)):
        explorer.choose(settings, "eaft_reap", 4)
        explorer.choose(settings, "reap", 5)
    assert len(passes) == 3
    explorer.sums(Settings(cc_quantile=0.3))
    assert sorted(passes[3:]) == ["group_sums", "token_weights"]


def loss_by_definition(trace, layer, kept):
    """sum_t ||sum_j (g - g^S)_j f_j||^2 as a share, a token at a time, with the whole Gram matrix."""
    experts, top_k = trace.num_experts, trace.expert.shape[2]
    pairs = list(itertools.combinations_with_replacement(range(experts), 2))
    lost = energy = 0.0
    for gram, logits in zip(trace.grams[layer], trace.router_logits[layer], strict=True):
        full = np.zeros((experts, experts))
        for (i, j), value in zip(pairs, gram, strict=True):
            full[i, j] = full[j, i] = value
        g, g_kept = (gates_of(logits.tolist(), allowed, top_k) for allowed in (range(experts), kept))
        difference = np.array(g) - np.array(g_kept)
        lost += difference @ full @ difference
        energy += np.array(g) @ full @ np.array(g)
    return lost / energy


def gates_of(logits, allowed, top_k):
    chosen = sorted(allowed, key=lambda i: (-logits[i], i))[:top_k]
    total = sum(math.exp(logits[i]) for i in chosen)
    return [math.exp(logits[i]) / total if i in chosen else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize("keep_n", [world.TOP_K, 4, world.EXPERTS])
def test_predicted_loss_is_the_definitions(trace, explorer, keep_n):
    kept = np.stack(
        [np.sort(np.random.default_rng(layer).permutation(world.EXPERTS)[:keep_n]) for layer in range(world.LAYERS)]
    )
    expected = [loss_by_definition(trace, layer, set(ids.tolist())) for layer, ids in enumerate(kept)]
    np.testing.assert_allclose(explorer.losses(kept), expected, rtol=1e-9, atol=1e-12)
    assert (keep_n == world.EXPERTS) == (max(expected) < 1e-9)


def test_recons_own_keep_sets_have_the_losses_that_it_wrote(ranking, explorer):
    entry = ranking["criteria"]["recon"]
    for count in entry["keep_sets"]:
        found = explorer.choose(Settings(), "recon", int(count))
        assert found.kept.tolist() == entry["keep_sets"][count]
        np.testing.assert_allclose(found.loss, entry["losses"][count], rtol=1e-9, atol=1e-12)


def test_mass_kept_is_the_share_of_g_n_of_the_pairs_routed_to_the_kept(trace, explorer):
    found = explorer.choose(Settings(), "reap", 4)
    assert found.kept.tolist() == choose(np.array(found.entry["ranking"]), 4).tolist()
    for layer, kept in enumerate(found.kept):
        total = inside = 0.0
        for row in trace.predictor_row:
            for e, g, n in zip(*(getattr(trace, k)[layer, row] for k in ("expert", "gate", "norm")), strict=True):
                total += float(g) * float(n)
                inside += float(g) * float(n) * (e in kept)
        assert found.mass[layer] == pytest.approx(inside / total)


def test_overlap_counts_common_experts_by_layer():
    rng = np.random.default_rng(0)
    a, b = (np.stack([np.sort(rng.permutation(9)[:n]) for _ in range(6)]) for n in (5, 4))
    assert overlap(a, b).tolist() == [len(set(x) & set(y)) for x, y in zip(a.tolist(), b.tolist(), strict=True)]


def test_a_trace_without_grams_has_everything_but_losses(trace, ranking):
    plain = replace(trace, grams=None, router_logits=None)
    without = ranking | {"criteria": {k: v for k, v in ranking["criteria"].items() if k != "recon"}}
    explorer = Explorer(plain, without)
    found = explorer.choose(Settings(), "eaft_reap", 4)
    assert found.loss is None and "recon" not in explorer.criteria
    figure = charts.keep_set(found, "eaft_reap", found, "reap")
    assert len(figure.data) == 5 and figure.layout.annotations[3].text.startswith("no predicted loss")
    figures.keep_set(found, "eaft_reap", found, "reap")
    with pytest.raises(ParameterError, match="criterion: found 'recon', expected one of"):
        explorer.choose(Settings(), "recon", 4)


def panel_of(explorer, tmp_path, **changes):
    values = {"ranking": "r/ranking.json", "keep_n": 4, "criterion": "eaft_reap", "out_dir": str(tmp_path)} | changes
    return Panel(explorer, **values)


def shown(figure):
    """(kept {(layer, id)}, in common, mass, loss) as a figure says."""
    heat, marks, common, mass, _, loss, _ = figure.data
    kept = {(int(y), int(heat.customdata[y][x][0])) for x, y in zip(marks.x, marks.y, strict=True)}
    return kept, list(common.y), list(mass.y), list(loss.y)


def expected_of(trace, ranking, settings, criterion, other, keep_n):
    entries = ranked(trace, settings)[0]["criteria"] | {"recon": ranking["criteria"]["recon"]}
    both = []
    for name in (criterion, other):
        own = entries[name].get("keep_sets", {}).get(str(keep_n))
        both.append(own or [sorted(layer[:keep_n]) for layer in entries[name]["ranking"]])
    kept = {(layer, e) for layer, ids in enumerate(both[0]) for e in ids}
    return kept, [len(set(a) & set(b)) for a, b in zip(*both, strict=True)], both[0]


def test_every_control_moves_the_figure(trace, ranking, explorer, tmp_path):
    panel = panel_of(explorer, tmp_path)
    now = {
        "settings": Settings(),
        "criterion": "eaft_reap",
        "other": panel.controls["compared_with"].value,
        "keep_n": 4,
    }
    moves = [
        ("cc_quantile", WIDE), ("w_good", -1.0), ("w_uncertain", 2.0), ("w_conflict", 3.0), ("align", "token"),
        ("criterion", "msan"), ("keep_n", world.EXPERTS), ("keep_n", 4), ("compared_with", "recon"), ("criterion", "recon"),
    ]  # fmt: skip
    for name, value in moves:
        before = panel.figure.to_json()
        panel.controls[name].value = value
        assert panel.figure.to_json() != before, name
        if name in Settings.__dataclass_fields__:
            now["settings"] = replace(now["settings"], **{name: value})
        else:
            now[{"compared_with": "other"}.get(name, name)] = value
        kept, common, ids = expected_of(trace, ranking, **now)
        found = shown(panel.figure)
        assert (found[0], found[1]) == (kept, common)
        losses = [loss_by_definition(trace, layer, set(layer_ids)) for layer, layer_ids in enumerate(ids)]
        np.testing.assert_allclose(found[3], losses, rtol=1e-9, atol=1e-12)
    assert panel.settings == now["settings"] and shown(panel.figure)[1] == [4] * world.LAYERS


def test_a_move_replaces_what_is_displayed(explorer, tmp_path, monkeypatch):
    updates, displayed = [], []

    class Handle:
        def update(self, bundle, raw):
            updates.append(bundle)

    def display(shown, raw=False, display_id=None):
        displayed.append(shown)
        return Handle() if display_id else None

    monkeypatch.setattr("IPython.display.display", display)
    monkeypatch.setattr("plotly.io.renderers.default", "plotly_mimetype")
    panel = panel_of(explorer, tmp_path)
    panel.show()
    assert {"image/png", "application/vnd.plotly.v1+json"} <= set(displayed[1])
    panel.controls["criterion"].value = "frequency"
    assert [u["application/vnd.plotly.v1+json"]["layout"]["annotations"][0]["text"] for u in updates] == [
        f"frequency keeps 4 of {world.EXPERTS}"
    ]


@pytest.mark.parametrize(
    "move, notebooks",
    [
        ({}, {"03_evaluate"}),
        ({"w_conflict": -0.5}, {"01_rank", "03_evaluate"}),
        ({"criterion": "recon", "w_conflict": -0.5}, {"03_evaluate"}),  # which no weight enters
    ],
)
def test_what_it_writes_are_parameters_that_lead_to_what_is_shown(explorer, tmp_path, monkeypatch, move, notebooks):
    monkeypatch.chdir(ROOT)
    panel = panel_of(explorer, tmp_path)
    for name, value in move.items():
        panel.controls[name].value = value
    button, said = panel.write_button().children
    button.click()
    files = {f"{'01' if p.stem == 'rank' else '03'}_{p.stem}": p for p in tmp_path.glob("*.yaml")}
    assert set(files) == notebooks and all(str(path) in said.value for path in files.values())
    for notebook, path in files.items():
        params.check_file(notebook, path)
    written = {book: yaml.safe_load(path.read_text()) for book, path in files.items()}
    chosen = written["03_evaluate"]["keep_set"][1]
    there = str(tmp_path / "rank" / "ranking.json") if "01_rank" in notebooks else "r/ranking.json"
    assert (chosen["ranking"], chosen["keep_n"]) == (there, 4) and chosen["criterion"] == move.get(
        "criterion", "eaft_reap"
    )
    assert written["03_evaluate"]["rows"] == "eval"  # ranked on calib
    if "01_rank" in notebooks:
        rank = written["01_rank"]
        assert rank["w_conflict"] == -0.5 and rank["criteria"] == ["eaft_reap"] and rank["seed"] == SEED
        assert rank["out_dir"] == str(tmp_path / "rank") and (rank["seq_len"], rank["num_blocks"]) == (40, 13)
    assert [*yaml.safe_load_all(panel.yaml())] == [written[book] for book in sorted(written)]


@pytest.mark.parametrize(
    "change, message", [({"keep_n": 5}, "keep_n: found 5"), ({"criterion": "reep"}, "found 'reep'")]
)
def test_a_count_or_criterion_that_is_not_to_be_had_is_named(explorer, tmp_path, change, message):
    with pytest.raises(ParameterError, match=message):
        panel_of(explorer, tmp_path, **change)


def test_the_notebook_runs_without_a_front_end_and_keeps_a_picture(trace, ranking, tmp_path, monkeypatch):
    write_ranking(tmp_path / "rank", ranking, ranked(trace, Settings())[1])
    trace.save(tmp_path / "rank" / "trace.safetensors")
    monkeypatch.chdir(ROOT)
    values = {
        "ranking": str(tmp_path / "rank" / "ranking.json"),
        "keep_n": 4,
        "criterion": "recon",
        "out_dir": str(tmp_path / "o"),
    }
    copy = tmp_path / "copy.ipynb"
    papermill.execute_notebook(
        ROOT / "notebooks" / "00_explore.ipynb", copy, values, progress_bar=False, kernel_name="python3"
    )
    outputs = [o for cell in nbformat.read(copy, 4).cells if cell.cell_type == "code" for o in cell.outputs]
    figure = next(o.data for o in outputs if "application/vnd.plotly.v1+json" in o.get("data", {}))
    assert len(figure["image/png"]) > 5000
    texts = [a["text"] for a in figure["application/vnd.plotly.v1+json"]["layout"]["annotations"]]
    mean = np.mean(ranking["criteria"]["recon"]["losses"]["4"])
    assert texts[0] == f"recon keeps 4 of {world.EXPERTS}" and texts[3].endswith(f"{mean:.4f}")
    assert not [o.text for o in outputs if o.get("name") == "stderr" and "Warning" in o.text]
    assert not os.path.exists(tmp_path / "o")  # nothing is written unasked
