"""The unmodified client against a loopback Kaggle that really executes what is pushed."""

import copy
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from kaggle_server import HF_TOKEN, KEY, OWNER, assert_loopback, log_of, session_environment, write_params

from eaftlib import project as code
from eaftlib.__main__ import main
from eaftlib.engine import placement as devices
from eaftlib.evaluation import results
from eaftlib.evaluation.evaluate import evaluate
from eaftlib.model.checkpoint import Checkpoint
from eaftlib.text.packs import PackSource

ROOT = Path(__file__).parents[1]


@pytest.fixture
def command(project, server, tmp_path):
    """Run a command against the server, and only against it; returns what it printed."""
    home = tmp_path / "home"
    home.mkdir()
    environment = session_environment(home) | server.environment(home)
    assert_loopback(environment)

    def run(*arguments, status=0):
        arguments = [sys.executable, "-m", *arguments]
        done = subprocess.run(arguments, cwd=project, env=environment, capture_output=True, text=True, timeout=300)
        print(done.stdout, done.stderr, sep="\n")
        assert done.returncode == status
        return done.stdout + done.stderr

    return run


@pytest.fixture
def typed(here, capsys):
    """The same in this process, which takes half a second less."""

    def run(*arguments, status=0):
        assert main(list(arguments)) == status
        said = capsys.readouterr()
        return said.out + said.err

    return run


def ledger_of(project, run):
    return json.loads((project / "kaggle_runs" / run / "run.json").read_text())


def assert_no_token_is_kept(project, version):
    """In nothing that was pushed, kept, printed or executed, though the session held one."""
    secrets = version.folder / "image" / "kaggle_secrets.py"
    assert HF_TOKEN in secrets.read_text() and HF_TOKEN not in version.log and KEY not in version.log
    for file in [*project.rglob("*"), *version.folder.rglob("*")]:
        if file.is_file() and file.parent != secrets.parent and "__pycache__" not in file.parts:
            content = file.read_bytes()
            assert KEY.encode() not in content and HF_TOKEN.encode() not in content, file


def entries_of(path):
    """(pack, seq_len) -> every number of a result but its speed."""
    content = json.loads(path.read_text())
    found = {(pack["pack"], length): entry for pack in content["packs"] for length, entry in pack["seq"].items()}
    for entry in found.values():
        del entry["model"]["tok_s_pred"]
    return found


def test_push_status_pull_give_a_local_runs_numbers(project, server, command, tmp_path):
    """The demo's model and packs, through every command, by the driver and by hand."""
    settings = {"seq_lens": [256, 512], "num_blocks": 2, "only": ["UNION"], "rows": "eval"}
    local = tmp_path / "local"
    evaluate(
        Checkpoint(str(ROOT / "demo/model")), PackSource(str(ROOT / "demo/packs")), devices.place("cpu", "float32"),
        {"base": None}, out_dir=local, progress=False, **settings,
    )  # fmt: skip
    (project / "demo").symlink_to(ROOT / "demo")
    demo = {
        "model": "demo/model",
        "packs": "demo/packs",
        "device": "cpu",
        "dtype": "float32",
        "out_dir": "outputs/demo/e",
    }
    params = "params/demo.yaml"
    (project / params).write_text(yaml.safe_dump(settings | demo))

    said = command("eaftlib", "kaggle", "push", "--until", "submitted", params)
    (run,) = server.kernels
    assert f"{run}  submitted, version 1: https://www.kaggle.com/code/{OWNER}/{run}" in said
    command("eaftlib", "kaggle", "push", "--until", "submitted", params)  # repeated: nothing new
    server.latest(run).stale = 1
    version = server.wait(run)
    assert f"{run}  running" in command("eaftlib", "kaggle", "status")
    said = command("eaftlib", "kaggle", "status")
    assert f"{run}  ended" in said and "30.0 of 30.0 GPU hours left" in said
    assert f"{run}  verified" in command("eaftlib", "kaggle", "pull")

    result = project / "kaggle_runs" / run / "result" / "base.json"
    assert entries_of(result) == entries_of(local / "base.json")
    there, by_itself = (results.read(file).tokens("UNION", 512) for file in (result, local / "base.json"))
    assert there.nll.tolist() == by_itself.nll.tolist()
    assert len(server.kernels[run]) == 1 and server.calls.count("SaveKernel") == 1
    ledger = ledger_of(project, run)
    states = [step["state"] for step in ledger["steps"]]
    assert states == ["queued", "pushing", "submitted", "running", "ended", "verified"]
    assert ledger["version"] == 1 and set(ledger["results"]) == {"base.json", "base.tokens.parquet"}
    assert results.read(result).meta["model_id"] == "demo/model"

    log = log_of(version)
    machine = json.loads((version.working / "eaft_run.json").read_text())["machine"]
    assert machine["torch"] == importlib.metadata.version("torch") and machine["where"] == "Kaggle"
    assert re.search(r"gpus +\S", log) and re.search(rf"transformers +{machine['transformers']}", log)
    assert f".whl, commit {code.commit(ROOT)}" in log and f"results in   {version.working}" in log

    # By hand: the client's own output command, and any executed copy of the notebook, give the same JSON.
    command("kaggle", "kernels", "output", f"{OWNER}/{run}", "-p", "by-hand")
    assert (project / "by-hand" / "base.json").read_bytes() == result.read_bytes()
    command("kaggle", "kernels", "pull", f"{OWNER}/{run}", "-p", "copy")
    said = command("eaftlib", "results", "from-notebook", f"copy/{run}.ipynb", "--out-dir", "copy")
    assert (project / "copy" / "base.json").read_bytes() == result.read_bytes() and "complete" in said

    assert "HF_TOKEN" not in version.log  # it was there: nothing said that it is missing
    assert_no_token_is_kept(project, version)


def test_built_by_hand_and_pushed_with_the_client(project, server, command, model_folder, forks):
    """The two commands that `build` prints; the model is mounted where Kaggle mounts models now."""
    source = "someone/tiny-gpt-oss/transformers/default/1"
    server.models[source] = model_folder
    server.session, server.forks = server.execute_in_fork, forks
    settings = project / "params" / "kaggle.yaml"
    settings.write_text(settings.read_text().replace("inputs:", f"inputs:\n  tiny/model: {source}"))
    said = command("eaftlib", "kaggle", "build", write_params(project, "eval", only=["UNION"], seq_lens=[24]), "built")
    for metadata in project.glob("built/**/*-metadata.json"):
        metadata.write_text(metadata.read_text().replace("INSERT_OWNER", OWNER))
    for line in re.findall(r"\.venv/bin/(kaggle .*?)(?: +#.*)?$", said, re.MULTILINE):
        command(*line.split())
    (run,) = server.kernels
    version = server.wait(run)
    assert version.request["modelDataSources"] == [source] and len(version.request["datasetDataSources"]) == 1
    assert version.status == "COMPLETE", version.log
    assert f"tiny/model: {version.folder}/input/models/{source}" in log_of(version)
    assert json.loads((version.working / "eaft_run.json").read_text())["status"] == "complete"


def test_a_session_stops_at_its_deadline_and_says_so(here, server, typed, forks):
    def hung(version):
        text = re.sub(r"'deadline_seconds': \d+", "'deadline_seconds': 2", version.request["text"])
        trap = "Session._install = lambda *a: time.sleep(40)\\nsession.start("
        version.request["text"] = text.replace("session.start(", trap)
        return server.execute_in_fork(version)

    server.session, server.forks = hung, forks
    typed("kaggle", "push", "--until", "submitted", write_params(here, "eval"))
    (run,) = server.kernels
    version = server.wait(run)
    content = json.loads((version.working / "eaft_run.json").read_text())
    assert content["status"] == "deadline" and 2 <= content["seconds"] < 20
    said = typed("kaggle", "pull", status=1)
    assert f"{run}  unfinished" in said and "the notebook's own deadline of 2 s is over" in said
    assert "left 0 passes" in said and "make kaggle-follow goes on from it" in said and "Traceback" not in said


def test_a_failing_session_is_marked_with_its_traceback_and_resumed_with_what_it_has(here, server, typed, forks):
    """The first attempt is killed after its second pass; the second scores only what is left."""
    params = write_params(here, "eval")

    def killed_in_its_third_pass(version):
        text = version.request["text"]
        trap = "from eaftlib.engine import forward\\nforward.score, n = (lambda s: lambda *a, **k: (n.append(1), "
        trap += "__import__('os').kill(__import__('os').getpid(), 9) if len(n) > 2 else None, s(*a, **k))[2])"
        trap += "(forward.score), []\\nwritten = evaluate("
        assert "written = evaluate(" in text
        version.request["text"] = text.replace("written = evaluate(", trap)
        return server.execute(version)

    server.session = killed_in_its_third_pass
    typed("kaggle", "push", "--until", "submitted", params)
    (run,) = server.kernels
    assert server.wait(run).status == "ERROR"
    said = typed("kaggle", "pull", status=1)
    assert f"{run}  unfinished" in said and "the session ended before its notebook did" in said
    assert "Traceback (most recent call last)" in said and "DeadKernelError" in said
    failed = here / "kaggle_runs" / run / "left-1"
    assert set(entries_of(failed / "base.json")) == {("UNION", "24"), ("UNION", "40")}
    assert "Ending Cell" in (failed / "session.log").read_text()

    assert len(server.kernels[run]) == 1  # not by itself
    server.session, server.forks = server.execute_in_fork, forks
    said = typed("kaggle", "push", "--until", "submitted", params)
    assert "resumes with base.json, base.tokens.parquet" in said and "version 2" in said
    assert sorted(len(files) for files in server.datasets.values()) == [2, 13]  # the model was not sent again
    version = server.wait(run)
    assert version.status == "COMPLETE"
    typed("kaggle", "pull")
    log = (here / "kaggle_runs" / run / "result" / "session.log").read_text()
    assert "finished by an earlier run of the same, not repeated: UNION 24, UNION 40\n" in log
    found = entries_of(here / "kaggle_runs" / run / "result" / "base.json")
    assert set(found) == {(pack, length) for pack in ("UNION", "pack_a") for length in ("24", "40")}
    assert found["UNION", "24"] == entries_of(failed / "base.json")["UNION", "24"]


def test_an_error_in_the_notebook_is_in_its_outcome_and_its_output(here, server, typed):
    """Too many blocks for the packs: the library's own message reaches the person who pulls, but not a token in it."""

    def telling(version):
        trap = "import os; from eaftlib import errors; errors.PackError.__str__ = lambda e: "
        trap += "e.args[0] + '; token ' + os.environ['HF_TOKEN']\\nwritten = evaluate("
        version.request["text"] = version.request["text"].replace("written = evaluate(", trap)
        return server.execute(version)

    server.session = telling
    typed("kaggle", "push", "--until", "submitted", write_params(here, "eval", num_blocks=4000))
    (run,) = server.kernels
    version = server.wait(run)
    said = typed("kaggle", "pull", status=1)
    assert "PackError: pack UNION (rows: all)" in said and "4000 were asked for" in said
    assert "; token ***" in said and "; token ***" in version.log
    assert_no_token_is_kept(here, version)
    executed = nbformat.read(version.working / "__notebook__.ipynb", 4)
    assert "EAFT-RUN" in json.dumps(executed) and '"status": "failed"' in json.dumps(executed).replace("\\", "")
    said = typed("results", "from-notebook", str(version.working / "__notebook__.ipynb"), status=1)
    assert f"{run}, attempt 1, failed: eaftlib.errors.PackError: pack UNION" in said


RUN_BY_HAND = """
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
notebook = nbformat.read("opened.ipynb", 4)
try:
    NotebookClient(notebook).execute()
except CellExecutionError as error:
    print(error, error.evalue)
nbformat.write(notebook, "executed.ipynb")
"""


def test_the_same_notebook_runs_in_colab(project, command, image, tmp_path):
    """Neither Kaggle's variable nor its mounts: files lie in the folder that the notebook is opened in.

    As a person does it: the first run says what to upload, then all cells are run again, then something is tried.
    """
    said = command("eaftlib", "kaggle", "build", write_params(project, "eval"), "built")
    run = re.search(r"eaft-tiny-eval-\w+", said)[0]
    content = tmp_path / "content"
    content.mkdir()
    notebook = nbformat.read(project / "built" / "notebook.ipynb", 4)
    first = [copy.deepcopy(cell) for cell in notebook.cells[:4]]
    first[-1].metadata.tags = ["raises-exception"]
    upload = f"import shutil\nshutil.copytree({str(project / 'tiny')!r}, {str(content / 'tiny')!r})"
    tried = "raise RuntimeError('401 for ' + os.environ['HF_TOKEN'])"
    notebook.cells = [*first, nbformat.v4.new_code_cell(upload), *notebook.cells, nbformat.v4.new_code_cell(tried)]
    for number, cell in enumerate(notebook.cells):
        cell.id = f"c{number}"
    nbformat.write(notebook, content / "opened.ipynb")
    environment = session_environment(tmp_path) | {"HF_TOKEN": HF_TOKEN}
    done = subprocess.run([image, "-c", RUN_BY_HAND], cwd=content, env=environment, capture_output=True, text=True)
    executed = (content / "executed.ipynb").read_text()
    assert re.search(rf"neither mounted nor in {content}; upload it there", executed), done.stdout + done.stderr
    assert (
        done.stdout.count("401 for ***") == 2 and executed.count("401 for ***") == 2
    )  # the kernel's reply, the output
    assert HF_TOKEN not in done.stdout + done.stderr + executed
    assert executed.count("EAFT-RUN {") == 2  # the first run's and the second's; what came after is not the run's
    assert {p.name for p in content.iterdir()} == {"tiny", "opened.ipynb", "executed.ipynb", run}
    assert {p.name for p in (content / run).iterdir()} == {"base.json", "base.tokens.parquet", "eaft_run.json"}
    command("eaftlib", "results", "from-notebook", str(content / "executed.ipynb"), "--out-dir", "copy")
    assert (project / "copy" / "base.json").read_bytes() == (content / run / "base.json").read_bytes()
    results.read(project / "copy" / "base.json")
