"""Notebook parameters: unknown names, wrong types and impossible values are errors before any work."""

import reprlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from eaftlib.errors import ParameterError
from eaftlib.params import Evaluate, Explore, Prune, Rank, Recover, Report, check_file, read_file

ROOT = Path(__file__).parents[1]

RANK = {
    "model": "m", "packs": "p", "pack_files": None, "rows": "all", "seq_len": 64, "num_blocks": 2, "criteria": ["reap"],
    "entropy_topk": 20, "cc_quantile": 0.15, "w_good": 1.0, "w_uncertain": 0.25, "w_conflict": -2.0,
    "align": "predictor", "recon_tokens": 4096, "device": "auto", "dtype": "auto", "max_gpu_memory": None, "seed": 0,
    "out_dir": "o",
}  # fmt: skip
PRUNE = {
    "model": "m", "ranking": "r", "criterion": "reap", "keep_frac": 0.5, "keep_n": None, "multiple_of": 4,
    "core_top_m": 0, "keep_super": False, "publish_to": None, "out_dir": "o",
}  # fmt: skip
NO_LABELS = ("", " a", "a b", ".a", "-a", "+a", "_a", "a/b", "a\n", "$a", "a|b", "a<b", "ä", "a" * 101)
EVALUATE = {
    "model": "m", "label": "base", "keep_set": None, "packs": "p", "pack_files": None, "only": None, "rows": "all",
    "seq_lens": [64, 128], "num_blocks": 2, "entropy_topk": 20, "cc_quantile": 0.15, "device": "auto", "dtype": "auto",
    "max_gpu_memory": 16.0,
    "out_dir": "o",
}  # fmt: skip
REPORT = {
    "results": ["a"], "baseline": "base", "gates": "g", "rankings": None, "conflict_texts": False, "out_dir": "o",
}  # fmt: skip
RECOVER = {
    "ranking": "r", "criterion": "reap", "keep_frac": None, "keep_n": 16, "multiple_of": 4, "core_top_m": 0,
    "keep_super": False, "model": "m", "trained": ["routers", "attention"], "attention_rank": 8, "packs": "p",
    "pack_files": None, "rows": "calib", "seq_len": 64, "num_blocks": 10, "held_out_blocks": 2, "batch_blocks": 8,
    "steps": 5, "learning_rate": 1e-3, "check_every": 2, "patience": 3, "other_weight": 0.15, "entropy_topk": 20,
    "cc_quantile": 0.15, "w_good": 1.0, "w_uncertain": 1.0, "w_conflict": 0.0, "seed": 0, "init": None,
    "device": "auto", "dtype": "auto", "max_gpu_memory": None, "publish_to": None, "out_dir": "o",
}  # fmt: skip
EXPLORE = {"ranking": "r", "criterion": "reap", "keep_n": 16, "out_dir": "o"}
KEEP = {"ranking": "r", "criterion": "reap", "keep_n": 16}
ALL = [(Rank, RANK), (Prune, PRUNE), (Evaluate, EVALUATE), (Recover, RECOVER), (Report, REPORT), (Explore, EXPLORE)]


@pytest.mark.parametrize("kind, values", ALL)
def test_the_fixed_names_are_accepted_and_no_others_exist(kind, values):
    assert kind.check(values).model_dump() == values
    assert set(kind.model_fields) == set(values)


@pytest.mark.parametrize("kind, values", ALL)
def test_an_unknown_name_is_an_error(kind, values):
    with pytest.raises(ParameterError, match="unknown parameter 'surprise'"):
        kind.check(values | {"surprise": 1})


def test_a_misspelt_name_is_met_with_the_right_one():
    with pytest.raises(ParameterError, match=r"unknown parameter 'num_block'\. Did you mean 'num_blocks'\?"):
        Evaluate.check(EVALUATE | {"num_block": 2})


@pytest.mark.parametrize("kind, values", [(Rank, RANK), (Evaluate, EVALUATE), (Report, REPORT)])
def test_a_missing_parameter_is_named(kind, values):
    for name in values:
        with pytest.raises(ParameterError, match=f"^{name}: "):
            kind.check({k: v for k, v in values.items() if k != name})


@pytest.mark.parametrize(
    "kind, values, change",
    [
        (Rank, RANK, {"seq_len": "64"}),
        (Rank, RANK, {"seq_len": 64.5}),
        (Rank, RANK, {"seq_len": 0}),
        (Rank, RANK, {"seq_len": True}),
        (Rank, RANK, {"num_blocks": -1}),
        (Rank, RANK, {"rows": "test"}),
        (Rank, RANK, {"align": "next"}),
        (Rank, RANK, {"criteria": "reap"}),
        (Rank, RANK, {"criteria": ["reap", 3]}),
        (Rank, RANK, {"criteria": ["reap", "reep"]}),
        (Rank, RANK, {"criteria": []}),
        (Rank, RANK, {"recon_tokens": 0}),
        (Rank, RANK, {"recon_tokens": 4096.5}),
        (Rank, RANK, {"cc_quantile": 0.0}),
        (Rank, RANK, {"cc_quantile": 1.0}),
        (Rank, RANK, {"w_good": "1"}),
        (Rank, RANK, {"w_good": float("nan")}),
        (Rank, RANK, {"entropy_topk": 1}),
        (Rank, RANK, {"seed": -1}),
        (Rank, RANK, {"seed": 2**63}),
        (Rank, RANK, {"model": None}),
        (Prune, PRUNE, {"criterion": ""}),
        (Prune, PRUNE, {"keep_n": "16"}),
        (Prune, PRUNE, {"keep_frac": "half"}),
        (Prune, PRUNE, {"ranking": None}),
        (Prune, PRUNE, {"publish_to": "no-owner"}),
        (Recover, RECOVER, {"publish_to": "owner/name/more"}),
        (Evaluate, EVALUATE, {"seq_lens": 64}),
        (Evaluate, EVALUATE, {"seq_lens": []}),
        (Evaluate, EVALUATE, {"seq_lens": [64, 0]}),
        (Evaluate, EVALUATE, {"only": "UNION"}),
        (Evaluate, EVALUATE, {"label": 3}),
        *((Evaluate, EVALUATE, {"label": label}) for label in NO_LABELS),
        (Evaluate, EVALUATE, {"keep_set": []}),
        (Evaluate, EVALUATE, {"only": []}),
        (Recover, RECOVER, {"trained": "routers"}),
        (Recover, RECOVER, {"trained": []}),
        (Recover, RECOVER, {"trained": ["routers", "experts"]}),
        (Recover, RECOVER, {"trained": ["routers", "norms", "routers"]}),
        (Recover, RECOVER, {"attention_rank": 0}),
        (Recover, RECOVER, {"rows": "train"}),
        (Recover, RECOVER, {"held_out_blocks": 0}),
        (Recover, RECOVER, {"batch_blocks": 0}),
        (Recover, RECOVER, {"steps": -1}),
        (Recover, RECOVER, {"seed": -1}),
        (Recover, RECOVER, {"learning_rate": 0.0}),
        (Recover, RECOVER, {"learning_rate": float("inf")}),
        (Recover, RECOVER, {"check_every": 0}),
        (Recover, RECOVER, {"patience": 0}),
        (Recover, RECOVER, {"other_weight": -0.1}),
        (Recover, RECOVER, {"other_weight": 1.5}),
        (Recover, RECOVER, {"other_weight": float("nan")}),
        (Recover, RECOVER, {"entropy_topk": 1}),
        (Recover, RECOVER, {"cc_quantile": 1.0}),
        (Recover, RECOVER, {"w_conflict": -2.0}),
        (Recover, RECOVER, {"w_good": float("inf")}),
        (Recover, RECOVER, {"seed": None}),
        (Recover, RECOVER, {"max_gpu_memory": 0.0}),
        (Report, REPORT, {"results": "a.json"}),
        (Report, REPORT, {"results": []}),
    ],
)
def test_wrong_types_and_values_name_the_parameter_and_what_was_found(kind, values, change):
    ((name, found),) = change.items()
    with pytest.raises(ParameterError) as error:
        kind.check(values | change)
    assert str(error.value).startswith(name)
    said = str(error.value)
    assert repr(found) in said or reprlib.repr(found) in said or any(repr(x) in said for x in found)


def test_a_ranking_in_which_no_token_counts_is_refused():
    with pytest.raises(ParameterError, match="w_good, w_uncertain, w_conflict: all are 0"):
        Rank.check(RANK | {"w_good": 0, "w_uncertain": 0.0, "w_conflict": -0.0})
    assert Rank.check(RANK | {"w_good": 0.0, "w_uncertain": 0.0, "w_conflict": -1.0}).w_conflict == -1.0


def test_whole_numbers_are_numbers_too():
    assert Rank.check(RANK | {"w_good": 1}).w_good == 1.0
    assert Prune.check(PRUNE | {"keep_frac": 1}).keep_frac == 1.0


def test_one_keep_set_becomes_arguments_under_the_label():
    expected = KEEP | {"keep_frac": None, "multiple_of": 4, "core_top_m": 0, "keep_super": False}
    assert Evaluate.check(EVALUATE | {"keep_set": KEEP}).keep_sets == {"base": expected}
    assert Evaluate.check(EVALUATE).keep_sets == {"base": None}
    assert Evaluate.check(EVALUATE | {"label": None}).keep_sets == {"base": None}


def test_a_label_of_a_hundred_characters_is_one():
    assert Evaluate.check(EVALUATE | {"label": "a.B_9+-" + "a" * 93}).label


def test_a_list_of_keep_sets_is_scored_in_its_order():
    entries = [{"label": "whole"}, KEEP | {"label": "half"}, KEEP | {"label": "core", "core_top_m": 2}]
    found = Evaluate.check(EVALUATE | {"label": None, "keep_set": entries}).keep_sets
    assert list(found) == ["whole", "half", "core"]
    assert found["whole"] is None and found["half"]["keep_n"] == 16 and found["core"]["core_top_m"] == 2


@pytest.mark.parametrize(
    "keep_set, word",
    [
        ([KEEP | {"label": "a"}, KEEP | {"label": "a"}], "share a label"),
        ([{"label": "a", "ranking": "r"}], "'a' needs ranking and criterion"),
        ([{"label": "a", "criterion": "reap", "keep_n": 4}], "'a' needs ranking and criterion"),
        ([{"label": "a", "core_top_m": 2}], "'a' needs ranking and criterion"),
        ([KEEP], "label"),
        *(([KEEP | {"label": label}], "label") for label in NO_LABELS),
        ([KEEP | {"label": "a", "keep": 3}], "keep"),
        ({"ranking": "r"}, "criterion"),
        (KEEP | {"label": "a"}, "label"),
        (KEEP | {"model": "m"}, "model"),
    ],
)
def test_incomplete_and_clashing_keep_sets_are_refused(keep_set, word):
    label = None if isinstance(keep_set, list) else "pruned"
    with pytest.raises(ParameterError, match=word):
        Evaluate.check(EVALUATE | {"label": label, "keep_set": keep_set})


def test_a_label_beside_a_list_and_a_keep_set_without_one_are_refused():
    with pytest.raises(ParameterError, match=r"label: 'sweep' names nothing beside a list.*set None"):
        Evaluate.check(EVALUATE | {"label": "sweep", "keep_set": [{"label": "whole"}]})
    with pytest.raises(ParameterError, match="label: the result of a keep-set needs a name"):
        Evaluate.check(EVALUATE | {"label": None, "keep_set": KEEP})


@pytest.mark.parametrize("keep_set", [KEEP | {"core_topm": 1}, [KEEP | {"label": "a", "core_topm": 1}]])
def test_a_misspelt_name_inside_a_keep_set_is_met_with_those_of_keep_sets(keep_set):
    with pytest.raises(ParameterError, match=r"core_topm.*core_top_m"):
        Evaluate.check(EVALUATE | {"keep_set": keep_set})


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"trained": ["routers"]},
            r"attention_rank: found 8, but trained is \['routers'\]; set None, or train attention",
        ),
        ({"held_out_blocks": 10}, r"held_out_blocks: found 10, expected fewer than num_blocks \(10\)"),
        ({"held_out_blocks": 3}, r"batch_blocks: found 8, expected at most 7, .*num_blocks 10 less held_out_blocks 3"),
        ({"w_good": 0, "w_uncertain": 0.0}, r"w_good, w_uncertain, w_conflict: all are 0"),
    ],
)
def test_what_a_recovery_cannot_be_is_refused_with_both_values(change, message):
    with pytest.raises(ParameterError, match=message):
        Recover.check(RECOVER | change)


def test_a_recovery_may_train_on_its_last_block_or_not_at_all():
    assert Recover.check(RECOVER | {"held_out_blocks": 9, "batch_blocks": 1}).batch_blocks == 1
    assert Recover.check(RECOVER | {"steps": 0, "init": "trained.safetensors"}).steps == 0
    assert Recover.check(RECOVER | {"trained": ["lm_head"], "attention_rank": None}).attention_rank is None
    assert Recover.check(RECOVER | {"w_good": 0, "w_uncertain": 0, "w_conflict": 1}).w_conflict == 1


def test_a_recoverys_keep_set_is_that_of_pruning():
    names = ("ranking", "criterion", "keep_frac", "keep_n", "multiple_of", "core_top_m", "keep_super")
    assert Recover.check(RECOVER).keep_set == {name: RECOVER[name] for name in names}
    assert Prune.check(PRUNE).keep_set.keys() == set(names)


def shell(values, cells):
    return SimpleNamespace(user_ns={**values, "In": ["", *cells], "other": object()})


DEFAULTS = "# Parameters\n" + "\n".join(f"{name} = {value!r}" for name, value in REPORT.items())


def test_a_notebooks_namespace_gives_its_parameters():
    assert Report.from_notebook(shell(REPORT, ["import os", DEFAULTS, "x = 1"])).model_dump() == REPORT


def test_a_misspelt_name_in_the_injected_cell_is_found_although_the_default_is_there():
    injected = "# Parameters\nbase_line = 'other'"
    with pytest.raises(ParameterError, match=r"unknown parameter 'base_line'.*'baseline'"):
        Report.from_notebook(shell(REPORT | {"base_line": "other"}, [DEFAULTS, injected, "x = 1"]))


def test_injected_values_win():
    injected = "# Parameters\nbaseline = 'other'"
    assert Report.from_notebook(shell(REPORT | {"baseline": "other"}, [DEFAULTS, injected])).baseline == "other"


def test_other_cells_may_set_what_they_like():
    assert Report.from_notebook(shell(REPORT | {"x": 1}, [DEFAULTS, "x = 1\ny: int = 2"])).baseline == "base"


def test_an_annotated_unknown_name_is_found():
    with pytest.raises(ParameterError, match="unknown parameter 'zzz'"):
        Report.from_notebook(shell(REPORT | {"zzz": 1}, [DEFAULTS + "\nzzz: int = 1"]))


def test_a_name_that_was_deleted_is_missing():
    values = {k: v for k, v in REPORT.items() if k != "gates"}
    with pytest.raises(ParameterError, match=r"^gates: "):
        Report.from_notebook(shell(values, [DEFAULTS]))


@pytest.mark.parametrize("cells", [[], ["import os"], ["# parameters\nbase_line = 'other'"], ["x = 1\n# Parameters"]])
def test_without_a_marked_cell_nothing_is_taken_on_trust(cells):
    with pytest.raises(ParameterError, match=r"no cell that was run begins with the line '# Parameters'"):
        Report.from_notebook(shell(REPORT | {"base_line": "other"}, cells))


HOSTILE = "out_dir = 'x'; __import__('pathlib').Path('owned').touch(); y"


def write_file(folder, text):
    (folder / "p.yaml").write_text(text)
    return folder / "p.yaml"


@pytest.mark.parametrize(
    "text, message",
    [
        (f'"{HOSTILE}": 1', r"unknown parameter \"out_dir = 'x'; __import__"),
        ("seq_len: [1]", r"p\.yaml: unknown parameter 'seq_len'.*'seq_lens'"),
        ("num_blocks: many", r"p\.yaml: num_blocks: .*found 'many'"),
        ("num_blocks: 4\nrows: eval\nnum_blocks: 8", r"p\.yaml is not YAML: 'num_blocks' is given twice"),
        ("keep_set:\n  - {label: a, label: b}", r"'label' is given twice"),
        ("- a\n- b", r"p\.yaml: expected names and values, found list"),
        ("model: [", r"p\.yaml is not YAML"),
        ("1: 2\nmodel: m", r"p\.yaml: found 1 for a name"),
        ("null: 2\nmodel: m", r"p\.yaml: found None for a name"),
        ("model: !!binary aGk=", r"found the tag '.*binary'"),
    ],
)
def test_a_file_is_checked_before_anything_runs(tmp_path, text, message):
    file = write_file(tmp_path, text)
    with pytest.raises(ParameterError, match=message):
        check_file("03_evaluate", file)


def test_a_file_may_merge_and_override(tmp_path):
    file = write_file(
        tmp_path, "keep_set:\n  - &a {label: a, ranking: r, criterion: ean, keep_n: 4}\n  - {<<: *a, label: b}"
    )
    first, second = read_file(file)["keep_set"]
    assert (first["label"], second["label"], second["keep_n"]) == ("a", "b", 4)


def test_make_runs_no_name_of_a_file(tmp_path):
    """papermill would write it into a cell, where it creates a file."""
    file = write_file(tmp_path, f'"{HOSTILE}": 1')
    command = ["make", "evaluate", f"PARAMS={file}", f"PY={sys.executable}", "READY=Makefile"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "unknown parameter" in done.stderr
    assert not (ROOT / "owned").exists() and "papermill" not in done.stderr


def test_every_shipped_file_fits_its_notebook():
    kinds = {"rank": "01_rank", "prune": "02_prune", "eval": "03_evaluate", "sweep": "03_evaluate"}
    kinds |= {"confirm": "03_evaluate", "final": "03_evaluate", "report": "04_report", "recover": "05_recover"}
    files = sorted((ROOT / "params").glob("*/**/*.yaml"))
    assert len(files) > 25
    for file in files:
        check_file(next(book for kind, book in kinds.items() if file.stem.startswith(kind)), file)
