"""The four notebooks on the demo model, run as a user runs them, with fewer blocks."""

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest
from papermill.exceptions import PapermillExecutionError

from eaftlib import notebooks
from eaftlib.evaluation import results

ROOT = Path(__file__).parents[1]


def execute(name, out, parameters, cwd=ROOT):
    """Run a notebook from ``cwd`` and return its executed copy."""
    before = Path.cwd()
    os.chdir(cwd)
    try:
        source, copy = ROOT / "notebooks" / f"{name}.ipynb", out / f"{name}.ipynb"
        papermill.execute_notebook(source, copy, parameters, progress_bar=False, kernel_name="python3")
    finally:
        os.chdir(before)
    return nbformat.read(copy, 4)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Rank, evaluate with keep-sets, prune, evaluate the checkpoint, report: folder and executed notebooks."""
    out = tmp_path_factory.mktemp("chain")
    ranking = str(out / "rank" / "ranking.json")
    small = {"only": ["UNION"], "rows": "eval", "num_blocks": 12, "out_dir": str(out / "evaluate")}
    keep = {"ranking": ranking, "criterion": "reap_mass", "keep_n": 24}
    sweep = [
        {"label": "base"},
        {"label": "mass-24", **keep},
        {"label": "random-8", **keep, "criterion": "random", "keep_n": 8},
    ]
    done = {}
    criteria = {"criteria": ["reap_mass", "eaft_reap", "recon", "random"], "recon_tokens": 512}
    done["rank"] = execute("01_rank", out, {"rows": "calib", "num_blocks": 8, **criteria, "out_dir": str(out / "rank")})
    done["evaluate"] = execute("03_evaluate", out, {"keep_set": sweep, **small})
    done["prune"] = execute("02_prune", out, {**keep, "out_dir": str(out / "pruned")})
    execute("03_evaluate", out, {"model": str(out / "pruned"), "label": "on-disk", **small})
    # started from notebooks/, as Jupyter does, paths still mean the repository's root
    report = {"results": [str(out / "evaluate")], "out_dir": str(out / "report")}
    few = {"trained": ["routers", "norms"], "seq_len": 256, "num_blocks": 10, "held_out_blocks": 2, "batch_blocks": 2}
    few |= {"steps": 2, "check_every": 1, "init": None, "out_dir": str(out / "recovered")}
    done["recover"] = execute("05_recover", out, {**keep, "criterion": "recon", "keep_n": 16, **few})
    done["report"] = execute("04_report", out, report, cwd=ROOT / "notebooks")
    return out, done


def test_every_notebook_is_exactly_its_source():
    assert notebooks.stale(ROOT / "notebooks") == []


@pytest.mark.parametrize("name", ["rank", "prune", "evaluate", "report", "recover"])
def test_an_executed_notebook_has_its_pictures_and_no_warning(chain, name):
    outputs = [o for cell in chain[1][name].cells if cell.cell_type == "code" for o in cell.outputs]
    pictures = [base64.b64decode(o.data["image/png"]) for o in outputs if "image/png" in o.get("data", {})]
    assert pictures and all(len(p) > 5000 for p in pictures)
    assert not [o.text for o in outputs if o.get("name") == "stderr" and "Warning" in o.text]


def test_the_chain_leaves_every_file_of_the_design(chain):
    out, _ = chain
    expected = {
        "rank": {"ranking.json", "saliency.parquet", "trace.safetensors"},
        "report": {"report.html", "report.md", "results.csv", "verdict.json", "figures"},
        "evaluate": {
            f"{m}{end}" for m in ("base", "mass-24", "random-8", "on-disk") for end in (".json", ".tokens.parquet")
        },
    }
    for folder, files in expected.items():
        assert {p.name for p in (out / folder).iterdir()} == files
    assert {"config.json", "tokenizer.json", "expert_mapping.json", "prune_manifest.json"} <= {
        p.name for p in (out / "pruned").iterdir()
    }


@pytest.mark.parametrize("seq_len", [1024, 2048])
def test_the_checkpoint_on_disk_scores_like_the_keep_set_it_was_cut_by(chain, seq_len):
    virtual, on_disk = (
        results.read(chain[0] / "evaluate" / f"{m}.json").tokens("UNION", seq_len) for m in ("mass-24", "on-disk")
    )
    assert np.array_equal(virtual.position, on_disk.position)
    np.testing.assert_allclose(on_disk.nll, virtual.nll, atol=2e-3)
    np.testing.assert_allclose(on_disk.nll.mean(), virtual.nll.mean(), rtol=1e-6)


def test_pruning_the_trained_demo_model_at_random_at_least_doubles_its_perplexity(chain):
    base, pruned = (
        results.read(chain[0] / "evaluate" / f"{m}.json").entries["UNION", 2048]["model"] for m in ("base", "random-8")
    )
    assert pruned["ppl"] >= 2 * base["ppl"]
    assert base["cc_rate"] > 0


def test_the_verdict_tells_the_models_apart(chain):
    verdict = json.loads((chain[0] / "report" / "verdict.json").read_text())
    assert verdict["models"]["random-8"]["verdict"] == "FAIL"
    assert verdict["models"]["mass-24"]["criterion"] == "reap_mass"
    # The checkpoint and the keep-set are one model: same checks to rounding.
    values = [
        [c["value"] for c in verdict["models"][m]["checks"] if c["gate"] == "dPPL"] for m in ("mass-24", "on-disk")
    ]
    np.testing.assert_allclose(*values, atol=1e-4)


def test_the_summary_prints_the_verdict(chain):
    command = [sys.executable, "-m", "eaftlib", "summary", chain[0] / "report" / "verdict.json"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(r"^random +\+\d+\.\d{3} *$", text, re.MULTILINE) and "keep 8" in text


def test_the_recovery_notebook_draws_one_curve_and_says_what_it_won(chain):
    """The curve is drawn anew in its place at every look: one picture is left, of the last."""
    code = [cell for cell in chain[1]["recover"].cells if cell.cell_type == "code"]
    cell = next(cell for cell in code if "recover(" in cell.source and "import" not in cell.source)
    assert sum("image/png" in o.get("data", {}) for o in cell.outputs) == 1
    text = "".join(o.text for cell in code for o in cell.outputs if o.get("name") == "stdout")
    assert re.search(r"perplexity of the text held back: \d+\.\d+ at first, \d+\.\d+ recovered, \d+\.\d+ whole", text)
    manifest = json.loads((chain[0] / "recovered" / "prune_manifest.json").read_text())
    assert manifest["recovered"]["trained"] == ["routers", "norms"] and manifest["num_experts_after"] == 16


def test_an_unknown_parameter_stops_a_notebook_before_any_work(tmp_path):
    with pytest.raises(PapermillExecutionError, match=r"unknown parameter 'keep_m'. Did you mean 'keep_n'"):
        execute("02_prune", tmp_path, {"keep_m": 24, "out_dir": str(tmp_path / "pruned")})
    assert not (tmp_path / "pruned").exists()


PARAMS = sorted((ROOT / "params").glob("*/**/*.yaml"))


@pytest.mark.parametrize("path", PARAMS, ids=lambda path: str(path.relative_to(ROOT / "params")))
def test_every_params_file_fits_its_notebook(path):
    import yaml

    from eaftlib import params

    books = {"rank": "01_rank", "prune": "02_prune", "report": "04_report", "recover": "05_recover"}
    name = next((book for kind, book in books.items() if path.stem.startswith(kind)), "03_evaluate")
    model = params.NOTEBOOKS[name]
    cell = next(
        c
        for c in nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4).cells
        if "parameters" in c.metadata.get("tags", [])
    )
    defaults: dict = {}
    exec(cell.source, defaults)  # the notebook's own defaults
    del defaults["__builtins__"]
    assert set(defaults) == set(model.model_fields)
    model.check(defaults | yaml.safe_load(path.read_text()))
