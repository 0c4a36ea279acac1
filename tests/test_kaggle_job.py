"""The table of notebooks that run on Kaggle: another notebook is one entry of it."""

import json
from pathlib import Path

import pytest
from kaggle_server import run_of

from eaftlib import notebooks, params
from eaftlib.errors import ResultError
from eaftlib.files import read_json
from eaftlib.kaggle import build, job, pulling, pushing
from eaftlib.kaggle.service import Service

KAGGLE = Path(job.__file__).parent


@pytest.mark.parametrize("module", sorted(f.name for f in KAGGLE.glob("*.py") if f.name != "job.py"))
def test_no_other_module_knows_a_notebook_by_name(module):
    text = (KAGGLE / module).read_text()
    assert [name for name in params.NOTEBOOKS if name in text] == []


class Recovery(params.Parameters):
    model: str
    start: str
    steps: int
    out_dir: str


RECOVERY = """
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
out_dir = "outputs/recover"
"""


def verify_steps(path, entry):
    if (found := read_json(path, ResultError, "repeat it")["steps"]) != entry.params["steps"]:
        raise ResultError(f"{path.name}: steps is {found}")


@pytest.fixture
def recovery(here, monkeypatch):
    """A fifth notebook: its parameters' class, its source, and one entry. Returns a file of its parameters."""
    (here / "notebooks" / "05_recover.py").write_text(RECOVERY.lstrip())
    notebooks.regenerate()
    (here / "tiny" / "start").mkdir()
    for name in ("last.safetensors", "history.parquet"):
        (here / "tiny" / "start" / name).write_text(name)
    entry = job.Job(
        inputs=lambda p: [job.Input(p["start"], lambda folder: [folder / "last.safetensors"], "start: not here")],
        files=lambda p: ["recovery.json"],
        verify=verify_steps,
    )
    monkeypatch.setitem(params.NOTEBOOKS, "05_recover", Recovery)
    monkeypatch.setitem(job.JOBS, "05_recover", entry)
    file = Path("params/recover.yaml")
    file.write_text("start: tiny/start\nsteps: 5\n")
    return file


@pytest.mark.parametrize("steps, state", [(5, "verified"), (6, "failed")])
def test_another_notebook_is_one_entry(here, server, play, recovery, steps, state):
    """Its input is carried as the entry says, and its result is verified as the entry says."""

    def session(version):
        (version.working / "recovery.json").write_text(json.dumps({"steps": steps}))
        return play(version)

    server.session = session
    service = Service(first_wait=0.01, longest_wait=0.02)
    (entry,) = pushing.push([recovery], service, say=lambda line: None)
    version = server.wait(entry.run)
    assert list(run_of(version)["files"]) == ["tiny/start/last.safetensors"]
    (entry,) = pulling.pull(service, say=lambda line: None)
    assert (entry.notebook, entry.state) == ("05_recover", state)
    assert state == "verified" or "recovery.json: steps is 6" in entry.steps[-1].note


def test_what_an_entry_needs_and_is_not_here_is_said_in_its_words(recovery):
    recovery.write_text("start: tiny/gone\nsteps: 5\n")
    with pytest.raises(params.ParameterError, match="start: not here"):
        build.plan(recovery, build.read_settings())
