"""The table of notebooks that run on Kaggle: another notebook is one entry of it."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from kaggle_server import run_of
from safetensors.numpy import save_file
from test_kaggle_faults import submit
from test_params import RECOVER

from eaftlib import notebooks, params
from eaftlib.errors import ResultError
from eaftlib.files import read_json
from eaftlib.kaggle import build, job, pulling
from eaftlib.kaggle.service import Service

KAGGLE = Path(job.__file__).parent


@pytest.mark.parametrize("module", sorted(f.name for f in KAGGLE.glob("*.py") if f.name != "job.py"))
def test_no_other_module_knows_a_notebook_by_name(module):
    text = (KAGGLE / module).read_text()
    assert [name for name in params.NOTEBOOKS if name in text] == []


class Another(params.Parameters):
    model: str
    start: str
    steps: int
    out_dir: str


ANOTHER = """
# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% tags=["parameters"]
# Parameters
model = "tiny/model"
start = "tiny/start"
steps = 3
out_dir = "outputs/another"
"""


def verify_steps(path, entry):
    if (found := read_json(path, ResultError, "repeat it")["steps"]) != entry.params["steps"]:
        raise ResultError(f"{path.name}: steps is {found}")


@pytest.fixture
def another(here, monkeypatch):
    """A notebook more: its parameters' class, its source, and one entry. Returns a file of its parameters."""
    (here / "notebooks" / "06_another.py").write_text(ANOTHER.lstrip())
    notebooks.regenerate()
    (here / "tiny" / "start").mkdir()
    for name in ("last.safetensors", "history.parquet"):
        (here / "tiny" / "start" / name).write_text(name)
    entry = job.Job(
        inputs=lambda p: [job.Input(p["start"], lambda folder: [folder / "last.safetensors"], "start: not here")],
        files=lambda p: ["another.json"],
        verify=verify_steps,
    )
    monkeypatch.setitem(params.NOTEBOOKS, "06_another", Another)
    monkeypatch.setitem(job.JOBS, "06_another", entry)
    file = Path("params/another.yaml")
    file.write_text("start: tiny/start\nsteps: 5\n")
    return file


@pytest.mark.parametrize("steps, state", [(5, "verified"), (6, "failed")])
def test_another_notebook_is_one_entry(here, server, play, another, steps, state):
    """Its input is carried as the entry says, and its result is verified as the entry says."""

    def session(version):
        (version.working / "another.json").write_text(json.dumps({"steps": steps}))
        return play(version)

    server.session = session
    service = Service(first_wait=0.01, longest_wait=0.02)
    (entry,) = submit([another], service, say=lambda line: None)
    version = server.wait(entry.run)
    assert list(run_of(version)["files"]) == ["tiny/start/last.safetensors"]
    (entry,) = pulling.pull(service, say=lambda line: None)
    assert (entry.notebook, entry.state) == ("06_another", state)
    assert state == "verified" or "another.json: steps is 6" in entry.steps[-1].note


def test_what_an_entry_needs_and_is_not_here_is_said_in_its_words(another):
    another.write_text("start: tiny/gone\nsteps: 5\n")
    with pytest.raises(params.ParameterError, match="start: not here"):
        build.plan(another, build.read_settings())


ASKED = RECOVER | {
    "model": "tiny/model", "packs": "tiny/packs", "ranking": "tiny/rank", "init": "tiny/trained.safetensors",
    "out_dir": "outputs/recovered-6",
}  # fmt: skip
# What a recovery's files say of a run that was asked for ASKED.
SETTINGS = {name: ASKED[name] for name in ASKED.keys() - {"device", "dtype", "max_gpu_memory", "publish_to", "out_dir"}}
TRAINED = {
    "trained": ["routers", "attention"], "attention_rank": 8, "parameters": 3970, "parameters_share": 0.036, "steps": 5,
    "best_step": 4, "tokens": 2560, "text": {"pack": "UNION", "rows": "calib"}, "init": None,
}  # fmt: skip
POINT = {"step": 4, "tokens": 2048, "loss": 0.5, "held_out_kl": 0.4, "held_out_ppl": 8.5, "seconds": 3.0}
LEFT = {
    "schema": "eaft-recovery/1", "settings": SETTINGS, "model_sha256": "m", "curve": [POINT], "best_step": 4,
    "recovered": TRAINED,
}  # fmt: skip


def leave(folder, content=LEFT, tensors=("model.norm.weight",)):
    """The two files of a recovery; returns the JSON's path."""
    save_file({name: np.ones(3, np.float32) for name in tensors}, folder / "trained.safetensors")
    (folder / "recovery.json").write_text(json.dumps(content))
    return folder / "recovery.json"


@pytest.fixture
def recover(here, monkeypatch):
    """The parameters of 05_recover under a notebook that does nothing, and what they name. Returns a file of them."""
    cell = "\n".join(f"{name} = {value!r}" for name, value in RECOVER.items())
    begin = ANOTHER.lstrip().split("# Parameters")[0]
    (here / "notebooks" / "05_recover.py").write_text(f"{begin}# Parameters\n{cell}\n")
    notebooks.regenerate()
    monkeypatch.setitem(params.NOTEBOOKS, "05_recover", params.Recover)
    (here / "tiny" / "rank").mkdir()
    for name in ("rank/ranking.json", "rank/saliency.parquet", "rank/trace.safetensors", "trained.safetensors"):
        (here / "tiny" / name).write_text(name)
    file = Path("params/recover.yaml")
    file.write_text(json.dumps({name: value for name, value in ASKED.items() if value != RECOVER[name]} | {"steps": 5}))
    return file


def test_a_recovery_carries_what_it_reads_and_brings_back_what_it_trained(here, server, play, recover):
    """Its results lie beside the checkpoint, in a folder that the session brings back in place of the checkpoint's."""

    def session(version):
        return play(version, change=lambda folder, content: leave(folder))

    server.session = session
    service = Service(first_wait=0.01, longest_wait=0.02)
    (entry,) = submit([recover], service, say=lambda line: None)
    run = run_of(server.wait(entry.run))
    carried = {name for name in run["files"] if not name.startswith(("tiny/model/", "tiny/packs/"))}
    assert carried == {"tiny/rank/ranking.json", "tiny/rank/saliency.parquet", "tiny/trained.safetensors"}
    assert {"tiny/model/config.json", "tiny/packs/pack_a.parquet"} <= run["files"].keys()
    assert run["results_folder"] == "outputs/recovered-6.training"
    (entry,) = pulling.pull(service, say=lambda line: None)
    assert (entry.notebook, entry.state) == ("05_recover", "verified"), entry.steps[-1].note
    assert {"recovery.json", "trained.safetensors"} <= {file.name for file in entry.result_folder.iterdir()}


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_a_recovery_of_other_settings_is_not_taken_for_this_one(tmp_path, name):
    entry = SimpleNamespace(params=ASKED)
    job.JOBS["05_recover"].verify(leave(tmp_path), entry)
    path = leave(tmp_path, LEFT | {"settings": SETTINGS | {name: "other"}})
    with pytest.raises(ResultError, match=rf"recovery\.json: {name} is other, expected .*another run's result"):
        job.JOBS["05_recover"].verify(path, entry)


@pytest.mark.parametrize("name", ["device", "dtype", "max_gpu_memory", "publish_to", "out_dir"])
def test_where_a_recovery_ran_is_none_of_its_settings(tmp_path, name):
    job.JOBS["05_recover"].verify(leave(tmp_path), SimpleNamespace(params=ASKED | {name: "other"}))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"settings": None}, r"recovery\.json: .* is None, expected "),
        ({"settings": ["rows"]}, r"recovery\.json: .* is None, expected "),
        ({"schema": "eaft-recovery/0"}, "schema is eaft-recovery/0, expected eaft-recovery/1"),
        ({"recovered": None}, r"recovery\.json: recovered: "),
        ({"recovered": TRAINED | {"parameters_share": 3.6}}, r"recovered\.parameters_share: "),
    ],
)
def test_a_recovery_of_another_shape_is_named(tmp_path, change, words):
    with pytest.raises(ResultError, match=words):
        job.JOBS["05_recover"].verify(leave(tmp_path, LEFT | change), SimpleNamespace(params=ASKED))


def test_a_recovery_without_its_tensors_is_none(tmp_path):
    entry = SimpleNamespace(params=ASKED)
    with pytest.raises(ResultError, match=r"trained\.safetensors holds no tensor"):
        job.JOBS["05_recover"].verify(leave(tmp_path, tensors=()), entry)
    path, tensors = leave(tmp_path), tmp_path / "trained.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-4])
    with pytest.raises(ResultError, match=r"trained\.safetensors cannot be read"):
        job.JOBS["05_recover"].verify(path, entry)
    tensors.unlink()
    with pytest.raises(ResultError, match=r"trained\.safetensors cannot be read"):
        job.JOBS["05_recover"].verify(path, entry)


def test_a_recovery_that_failed_leaves_nothing_that_an_evaluation_could_go_on_from(tmp_path):
    leave(tmp_path)
    assert job.JOBS["03_evaluate"].partial(tmp_path) == ([], 0)


@pytest.mark.parametrize(
    "gone, words", [("tiny/rank", "run 01_rank first"), ("tiny/trained.safetensors", "init: tiny/")]
)
def test_what_a_recovery_reads_must_be_here(here, recover, gone, words):
    Path(gone).rename("elsewhere")
    with pytest.raises(params.ParameterError, match=words):
        build.plan(recover, build.read_settings())


def test_a_recovery_from_the_pruned_model_carries_no_init(recover):
    recover.write_text(json.dumps(json.loads(recover.read_text()) | {"init": None}))
    carried = [c.name for c in build.plan(recover, build.read_settings()).carried]
    assert "tiny/rank/ranking.json" in carried and not any("trained" in name for name in carried)


def test_pruning_is_not_taken_for_recovery_though_that_knows_all_its_names(recover):
    """Nor are names that ranking and recovery share taken for either."""
    names = {"model": "tiny/model", "out_dir": "outputs/x"}
    recover.write_text(json.dumps(names | {"ranking": "tiny/rank", "criterion": "reap", "keep_n": 6}))
    assert build.plan(recover, build.read_settings()).notebook == "02_prune"
    recover.write_text(json.dumps(names | {"packs": "tiny/packs", "seq_len": 40, "num_blocks": 3}))
    words = (
        r"fit \['01_rank', '05_recover'\], expected exactly one of .* Give one more of those that only the right one"
    )
    with pytest.raises(params.ParameterError, match=words):
        build.plan(recover, build.read_settings())
