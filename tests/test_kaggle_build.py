"""The push folder, the set-up cell, and what is read back from an executed notebook."""

import ast
import base64
import hashlib
import html
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
import types
import urllib.parse
import zipfile
from pathlib import Path

import nbformat
import pytest
import world
import yaml
from IPython.core.interactiveshell import InteractiveShell
from kaggle_server import HF_TOKEN, TINY, run_of, write_params
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_kaggle_faults import submit
from traitlets.config import Config

from eaftlib import params
from eaftlib import project as code
from eaftlib.errors import KaggleError, ParameterError, ResultError
from eaftlib.evaluation import results
from eaftlib.kaggle import build, ledger, outcome, pulling, setup_cell
from eaftlib.kaggle.job import JOBS
from eaftlib.kaggle.service import Service

ROOT = Path(__file__).parents[1]


def build_run(name="eval", folder="built", **changes):
    """Build in the working directory; returns the plan."""
    settings = build.read_settings()
    plan = build.plan(Path(write_params(Path.cwd(), name, **changes)), settings)
    build.build(plan, settings, Path(folder), "tester")
    return plan


def cells_of(folder="built"):
    return nbformat.read(Path(folder) / "notebook.ipynb", 4).cells


def embedded_wheel(cells):
    """The bytes in the wheel cell, read without executing it."""
    cell = next(c.source for c in cells if c.source.startswith("# eaftlib itself"))
    return base64.b85decode("".join(re.findall(r'^    "(.*)"$', cell, re.MULTILINE)))


def test_the_push_folder(here):
    plan = build_run()
    metadata = json.loads(Path("built/kernel-metadata.json").read_text())
    files = json.loads(Path("built/files/dataset-metadata.json").read_text())
    assert metadata == {
        "id": f"tester/{plan.run}", "title": plan.run, "code_file": "notebook.ipynb", "language": "python",
        "kernel_type": "notebook", "is_private": True, "enable_gpu": True, "enable_internet": True,
        "machine_shape": "NvidiaTeslaT4", "dataset_sources": [files["id"]], "model_sources": [], "kernel_sources": [],
        "competition_sources": [],
    }  # fmt: skip
    assert re.fullmatch(r"eaft-tiny-eval-[0-9a-f]{8}", plan.run)
    stored = {f.name: f.read_bytes() for f in Path("built/files").iterdir() if f.name != "dataset-metadata.json"}
    given = {f.relative_to(here).as_posix(): f for part in ("model", "packs") for f in (here / "tiny" / part).iterdir()}
    assert stored == {name.replace("/", "__"): f.read_bytes() for name, f in given.items()}


def test_the_notebook_is_valid_and_of_the_kernel_that_kaggle_has(here):
    plan = build_run(only=["UNION"])
    notebook = nbformat.read("built/notebook.ipynb", 4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    injected = next(c for c in notebook.cells if "injected-parameters" in c.metadata.get("tags", []))
    values: dict = {}
    exec(injected.source, values)
    assert {name: values[name] for name in plan.parameters} == plan.parameters and values["only"] == ["UNION"]
    titles = [c.source.splitlines()[0] for c in notebook.cells if c.cell_type == "markdown"]
    assert titles[:2] == [f"# {plan.run}", "# 3 · What did that cost?"] and titles[-1] == "## The result"


def test_the_same_run_is_the_same_bytes(here, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(here)
    build_run(folder="a"), build_run(folder="b")
    assert (here / "a" / "notebook.ipynb").read_bytes() == (here / "b" / "notebook.ipynb").read_bytes()


def test_the_embedded_wheel_is_the_library(here, tmp_path):
    build_run()
    wheel = tmp_path / "eaftlib-0.1.0-py3-none-any.whl"
    wheel.write_bytes(embedded_wheel(cells_of()))
    assert wheel.stat().st_size < 500_000
    run = next(c.source for c in cells_of() if c.source.startswith("RUN = "))
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() in run and code.code_sha256() in run
    with zipfile.ZipFile(wheel) as archive:
        packed = {n: archive.read(n) for n in archive.namelist() if n.startswith("eaftlib/")}
    sources = [f for f in (ROOT / "eaftlib").rglob("*") if f.suffix in (".py", ".jinja", ".js", ".css")]
    assert packed == {f.relative_to(ROOT).as_posix(): f.read_bytes() for f in sources}
    target = ["--target", tmp_path / "lib"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", *target, wheel], check=True
    )
    ask = "import eaftlib.project as p; print(p.__file__, p.code_sha256())"
    done = subprocess.run(
        [sys.executable, "-c", ask],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "lib")},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [str(tmp_path / "lib" / "eaftlib" / "project.py"), code.code_sha256()]


def test_the_notebook_of_the_real_regime_is_far_from_the_limit(here):
    (here / "params" / "gpt-oss-20b").mkdir()
    text = (ROOT / "params" / "gpt-oss-20b" / "eval-base-1024.yaml").read_text()
    file = here / "params" / "gpt-oss-20b" / "eval-base-1024.yaml"
    file.write_text(text)
    settings = build.read_settings()
    plan = build.plan(file.relative_to(here), settings)
    build.build(plan, settings, Path("built"), "tester")
    assert (here / "built" / "notebook.ipynb").stat().st_size < 500_000
    metadata = json.loads((here / "built" / "kernel-metadata.json").read_text())
    assert (
        metadata["model_sources"] == ["openai/gpt-oss-20b/transformers/default/1"] and metadata["dataset_sources"] == []
    )
    assert not (here / "built" / "files").exists()


SHIPPED = [f for f in sorted((ROOT / "params").glob("*/**/*.yaml")) if not f.name.startswith(("prune", "report"))]


@pytest.mark.parametrize("file", [str(f.relative_to(ROOT)) for f in SHIPPED])
def test_what_a_notebook_gets_passes_its_own_check(here, file):
    """Every shipped run, read back from its built notebook as the notebook's kernel would, is what the file says."""
    said = yaml.safe_load((ROOT / file).read_text())
    kinds = {"rank": params.Rank, "recover": params.Recover}
    kind = next((kind for name, kind in kinds.items() if Path(file).name.startswith(name)), params.Evaluate)
    (here / "demo").symlink_to(ROOT / "demo")
    keep_sets = said.get("keep_set") or []
    for keep in [said, *([keep_sets] if isinstance(keep_sets, dict) else keep_sets)]:
        if "ranking" in keep and not Path(keep["ranking"]).is_file():
            Path(keep["ranking"]).parent.mkdir(parents=True, exist_ok=True)
            Path(keep["ranking"]).write_text("{}")
    if said["model"].startswith("outputs/"):
        Path(said["model"]).mkdir(parents=True)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text((ROOT / file).read_text())
    settings = build.read_settings()
    build.build(build.plan(Path(file), settings), settings, Path("built"), "tester")
    namespace = {}
    for cell in cells_of():
        if {"parameters", "injected-parameters"} & set(cell.metadata.get("tags", [])):
            exec(cell.source, namespace)
    found = kind.check({name: namespace[name] for name in kind.model_fields})
    assert {name: getattr(found, name) for name in said if name != "keep_set"} == {
        name: value for name, value in said.items() if name != "keep_set"
    }
    if kind is params.Evaluate:
        expected = params.of_notebook("03_evaluate", said)
        assert found.keep_sets == expected.keep_sets and found == expected


def test_a_notebook_that_kaggle_would_refuse_is_not_built(here, monkeypatch):
    monkeypatch.setattr(build, "NOTEBOOK_LIMIT", 100_000)
    with pytest.raises(KaggleError, match=r"the notebook has [34]\d\d,\d\d\d bytes; Kaggle takes 100,000"):
        build_run()


def test_a_run_has_one_name_however_its_file_is_given(here):
    settings, file = build.read_settings(), Path(write_params(here, "eval"))
    assert build.plan(file, settings).run == build.plan(file.absolute(), settings).run


def test_a_large_wheel_goes_into_the_data_set(here, monkeypatch, wheel):
    monkeypatch.setattr(build, "WHEEL_LIMIT", 1000)
    build_run()
    assert embedded_wheel(cells_of()) == b""
    assert (here / "built" / "files" / wheel.name).read_bytes() == wheel.read_bytes()


@pytest.mark.parametrize("given", ["tiny/rank", "tiny/rank/ranking.json"])
def test_rankings_are_carried_once_each_with_their_sums(here, given):
    (here / "tiny" / "rank").mkdir()
    for name in ("ranking.json", "saliency.parquet", "trace.safetensors"):
        (here / "tiny" / "rank" / name).write_text(name)
    keep = {"ranking": given, "criterion": "reap", "keep_n": 4}
    build_run(label=None, keep_set=[{"label": "base"}, {"label": "a"} | keep, {"label": "b"} | keep])
    stored = sorted(f.name for f in (here / "built" / "files").glob("tiny__*") if "model" not in f.name)
    assert stored == ["tiny__packs__pack_a.parquet", "tiny__packs__pack_b.parquet", "tiny__packs__pack_c.parquet",
                      "tiny__rank__ranking.json", "tiny__rank__saliency.parquet"]  # fmt: skip


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_block": 3}, "its names .*'num_block'.* fit no notebook"),
        ({"num_blocks": 0}, "num_blocks"),
        ({"out_dir": "/tmp/out"}, "out_dir: found '/tmp/out'; a run on Kaggle needs a path below"),
        ({"out_dir": "../out"}, r"out_dir: found '\.\./out'"),
        ({"out_dir": "."}, r"out_dir: found '\.'"),
        ({"model": "/"}, "/: found '/'; a run on Kaggle needs a path below"),
        ({"keep_set": {"ranking": "no.json", "criterion": "reap", "keep_n": 4}}, "no.json does not exist; run 01_rank"),
    ],
)
def test_what_cannot_run_on_kaggle_is_refused(here, changes, words):
    with pytest.raises(ParameterError, match=words):
        build_run(**changes)
    assert not (here / "built").exists()


@pytest.mark.parametrize("name", ["demo/report", "demo/report-final"])
def test_what_needs_no_gpu_is_not_pushed(here, name):
    with pytest.raises(ParameterError, match="needs no GPU: run it where its files are"):
        build.plan(ROOT / "params" / f"{name}.yaml", build.read_settings())


@pytest.mark.parametrize(
    "text, words", [("a: [", "is not YAML"), ("- 1", "expected names and values"), (None, "does not exist")]
)
def test_a_file_that_is_no_parameters_is_named(here, text, words):
    file = here / "odd.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ParameterError, match=rf"odd\.yaml:? .*{words}|odd\.yaml: {words}"):
        build.plan(file, build.read_settings())


def test_only_code_that_the_wheel_has_is_hashed_and_the_wheel_has_all(tmp_path, wheel):
    package = tmp_path / "eaftlib"
    shutil.copytree(ROOT / "eaftlib", package, ignore=shutil.ignore_patterns("__pycache__"))
    assert code.code_sha256(package) == code.code_sha256()
    for name in (".ipynb_checkpoints/packs-checkpoint.py", ".hidden.py", "__pycache__/packs.cpython-311.pyc"):
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).write_text("x = 1")
        assert code.code_sha256(package) == code.code_sha256()
    build._require_all_code(wheel, code.code_sha256(package), tmp_path)
    (package / "added").mkdir()
    (package / "added" / "module.py").write_text("x = 1")
    with pytest.raises(KaggleError, match=r"pyproject\.toml's packages do not name every folder"):
        build._require_all_code(wheel, code.code_sha256(package), tmp_path)


def test_a_notebook_that_differs_from_its_source_is_not_pushed(here):
    with (here / "notebooks" / "03_evaluate.py").open("a") as source:
        source.write("\n# %%\nprint(1)\n")
    with pytest.raises(ParameterError, match="differs from its source; run make notebooks"):
        build_run()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"accelerators": "x"}, "unknown parameter 'accelerators'. Did you mean 'accelerator'"),
        ({"session_hours": 13}, "session_hours"),
        (
            {"inputs": {"openai/gpt-oss-20b": "openai/gpt-oss-20b/transformers/default"}},
            "expected owner/data-set or owner/model",
        ),
        ({"internet": "yes"}, "internet"),
        ({"inputs": {"m": "openai/gpt-oss-20b/transformers/default/latest"}}, "the version a number, found 'openai"),
        ({"wheels": "mywheels"}, "wheels: expected a data set's owner/name, found 'mywheels'"),
        ({"wheels": "a/b/c"}, "wheels: expected a data set's owner/name, found 'a/b/c'"),
    ],
)
def test_settings_are_checked(here, change, words):
    values = yaml.safe_load((here / "params" / "kaggle.yaml").read_text())
    (here / "params" / "kaggle.yaml").write_text(yaml.safe_dump(values | change))
    with pytest.raises(ParameterError, match=words):
        build.read_settings()


# --- the set-up cell, without a notebook around it ---------------------------------------------------------------------


@pytest.fixture
def session(tmp_path, monkeypatch):
    """A session's object as on Kaggle, in a folder of its own; nothing started."""
    (tmp_path / "input").mkdir()
    (tmp_path / "working").mkdir()
    monkeypatch.chdir(tmp_path / "working")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    run = {
        "run": "eaft-x",
        "attempt": 1,
        "params_sha256": "p",
        "code_sha256": "c",
        "commit": "abc",
        "results_folder": "outputs/x",
        "brings": [],
    }
    run |= {
        "internet": False,
        "deadline_seconds": 0.05,
        "wheel": {"name": "w.whl", "sha256": "0"},
        "requires": [],
        "python": ">=3.11",
    }
    run |= {"wheel_mounts": ["datasets/o/w"], "mounts": {}, "file_mounts": ["datasets/o/f", "f"], "files": {}}
    return setup_cell.Session(run)


def stored(session, name, content=b"text", layout="datasets/o/f", resume=False):
    folder = session.inputs / layout
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name.replace("/", "__")).write_bytes(content)
    digest = hashlib.sha256(b"text").hexdigest()
    session.run["files"][name] = {"stored_as": name.replace("/", "__"), "sha256": digest, "resume": resume}


@pytest.mark.parametrize("layout", ["datasets/o/f", "f"])
def test_carried_files_lie_where_the_parameters_say_in_both_layouts(session, layout):
    stored(session, "demo/model/config.json", layout=layout)
    stored(session, "demo/packs/a[1].parquet", layout=layout)
    stored(session, "base.json", layout=layout, resume=True)
    session._link_paths()
    assert Path("demo/packs/a[1].parquet").read_text() == "text"
    assert Path("demo/model/config.json").read_text() == "text"
    assert (session.work / "base.json").read_text() == "text" and not (session.work / "base.json").is_symlink()
    Path("outputs/x/new.json").write_text("1")
    assert (session.work / "new.json").read_text() == "1"
    assert sorted(p.name for p in session.work.iterdir()) == ["base.json", "new.json"]


def test_a_mounted_model_lies_under_its_name(session):
    (session.inputs / "gpt-oss-20b/transformers/default/1").mkdir(parents=True)
    session.run["mounts"] = {
        "openai/gpt-oss-20b": ["models/openai/gpt-oss-20b/transformers/default/1", "gpt-oss-20b/transformers/default/1"]
    }
    session._link_paths()
    assert Path("openai/gpt-oss-20b").resolve() == session.inputs / "gpt-oss-20b/transformers/default/1"


def test_a_damaged_or_missing_input_is_named(session):
    stored(session, "demo/x", b"other")
    with pytest.raises(ValueError, match="is not the demo/x that this notebook was built with"):
        session._link_paths()
    session.run |= {"files": {}, "mounts": {"openai/gpt-oss-20b": ["gone"]}}
    session.scratch = session.home / "again"
    session.scratch.mkdir()
    with pytest.raises(FileNotFoundError, match=r"openai/gpt-oss-20b is not mounted .* and internet is off"):
        session._link_paths()


@pytest.mark.parametrize(
    "requires, words",
    [
        (
            ["transformers>=99"],
            r"missing or too old: transformers>=99 \(here: \d.*\). Turn internet on, or put their wheels",
        ),
        (["no-such-package"], "missing or too old"),
        (["torch>=99"], "this image is too old"),
    ],
)
def test_an_image_that_is_too_old_says_what_to_do(session, requires, words):
    session.run["requires"] = requires
    with pytest.raises(RuntimeError, match=words):
        session._require_packages()


def test_an_image_with_an_older_python_says_so(session):
    session.run["python"] = ">=4"
    with pytest.raises(RuntimeError, match=r"Python 3\.\d+\.\d+; needed: >=4\. Choose a newer image"):
        session._require_packages()


def test_an_image_that_is_new_enough_installs_nothing(session, monkeypatch):
    session.run["requires"] = build._requirements()
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("something was installed"))
    session._require_packages()
    assert {re.split("[<>=]", r)[0] for r in session.run["requires"]} >= {
        "torch",
        "transformers",
        "pydantic",
        "pyarrow",
    }


def imported(files):
    """Distributions that the files import, without those that torch, kaggle or an image brings."""
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    brought = {"triton", "kagglesdk", "kaggle_secrets", "google"}  # the last is google.colab
    roots = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"eaftlib"} - brought
    owners = importlib.metadata.packages_distributions()
    return {canonicalize_name(owners[root][0]) for root in roots}


def declared(requirements):
    return {canonicalize_name(Requirement(r).name) for r in requirements}


def test_every_import_is_declared_and_a_session_installs_what_runs_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    files = set((ROOT / "eaftlib").rglob("*.py"))
    outside = {file for file in files if "kaggle" not in file.parts}
    assert imported(files) >= {"torch", "pydantic", "pyyaml", "requests", "ipython", "packaging"}  # it does see them
    assert imported(outside) <= declared(project["dependencies"] + extras["notebooks"])
    assert imported(files) <= declared(project["dependencies"] + extras["notebooks"] + extras["kaggle"])
    pinned = (ROOT / "requirements.txt").read_text().splitlines()
    assert imported(files) <= declared(line for line in pinned if not line.startswith("#"))
    inside = outside - {ROOT / "eaftlib" / "notebooks.py"}  # reads and writes notebooks before they run
    needed = imported(inside) | imported((ROOT / "notebooks").glob("*.py"))
    assert needed - {"pyyaml"} <= declared(build._requirements())  # parameters' files are read before a session, too


def test_a_damaged_wheel_is_not_installed(session):
    with pytest.raises(ValueError, match=r"w\.whl is damaged"):
        session._install(base64.b85encode(b"something else").decode())


def test_the_deadline_stops_whatever_runs(session, monkeypatch):
    timers = []
    real = signal.setitimer
    monkeypatch.setattr(signal, "setitimer", lambda *a: timers.append(a[1:]) or real(*a))
    session._set_deadline()
    assert timers == [(0.05, 30)]  # and again, should it fall where errors are caught
    try:
        with pytest.raises(TimeoutError, match=r"deadline of 0\.05 s is over; .* make kaggle-follow goes on from it"):
            signal.pause()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def test_a_token_in_an_error_does_not_reach_the_outcome(session, capsys):
    session.secrets.append(HF_TOKEN)
    session.finish("failed", f"Traceback\nHTTPError: 401 for {HF_TOKEN}")
    assert "401 for ***" in (session.work / "eaft_run.json").read_text()
    assert HF_TOKEN not in (session.work / "eaft_run.json").read_text() + capsys.readouterr().out


@pytest.mark.parametrize(
    "spelled",
    [
        HF_TOKEN,
        base64.b64encode(HF_TOKEN.encode()).decode(),
        base64.b64encode(f"user:{HF_TOKEN}".encode()).decode().rstrip("="),
        base64.urlsafe_b64encode(f"Bearer {HF_TOKEN}".encode()).decode(),
    ],
)
def test_a_token_is_masked_however_it_is_spelled(session, capsys, spelled):
    session.secrets.append(HF_TOKEN)
    session.finish("failed", f"HTTPError: Authorization: Basic {spelled}, repeated")
    written = (session.work / "eaft_run.json").read_text()
    assert "Basic ***, repeated" in written and spelled not in written + capsys.readouterr().out


def test_a_secret_of_odd_characters_is_masked_in_urls_json_and_html():
    secret = 'a"/+&é 0123456789'
    inside = [
        json.dumps(secret),
        json.dumps(json.dumps(secret)),
        urllib.parse.quote(secret, safe=""),
        html.escape(secret),
    ]
    for text in [secret, *inside, urllib.parse.quote(json.dumps(secret))]:
        assert "0123456789" not in setup_cell.mask(f"x {text} y", [secret]), text
    assert setup_cell.mask("nothing of it: aGVsbG8=", [secret]) == "nothing of it: aGVsbG8="


def test_a_session_may_fail_and_then_complete_but_not_the_other_way_round(session, capsys):
    def status():
        found = json.loads((session.work / "eaft_run.json").read_text())
        return found["status"], found["error"]

    session.in_batch = False  # by hand
    session.finish("failed", "E: first")
    assert status() == ("failed", "E: first")
    session.finish("complete")
    assert status() == ("complete", None)
    session.finish("failed", "E: a cell that was tried afterwards")
    assert status() == ("complete", None) and capsys.readouterr().out.count("EAFT-RUN") == 2


def test_in_a_batch_that_goes_on_after_errors_the_first_stands(session, capsys):
    session.finish("failed", "E: first")
    session.finish("failed", "E: what follows from it")
    session.finish("complete")
    found = json.loads((session.work / "eaft_run.json").read_text())
    assert (found["status"], found["error"]) == ("failed", "E: first")
    assert capsys.readouterr().out.count("EAFT-RUN") == 1


@pytest.fixture
def shell(session, monkeypatch, tmp_path):
    """A real shell that the session's set-up cell finds."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # a shell brings its own
    monkeypatch.setattr(sys, "path", list(sys.path))
    shell = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))
    monkeypatch.setattr(setup_cell, "get_ipython", lambda: shell)
    return shell


SPOKEN = {
    "an error": "raise RuntimeError('401 for ' + token)",
    "an error with its cause": "try:\n    open(token)\nexcept OSError as e:\n    raise RuntimeError('no') from e",
    "a class that words it": "class E(Exception):\n    def __str__(self): return '401 for ' + token\nraise E",
    "a group": "raise ExceptionGroup('many ' + token, [ValueError(token)])",
    "a syntax error": "compile('1 +', token, 'exec')",
    "a magic": "from IPython.core.error import UsageError\nraise UsageError(token)",
}


@pytest.mark.parametrize("cell", SPOKEN.values(), ids=SPOKEN)
def test_a_token_in_an_error_does_not_reach_its_cell_or_the_kernels_reply(session, shell, capsys, cell):
    session.secrets.append(HF_TOKEN)
    session._watch_cells()
    shell.user_ns["token"] = HF_TOKEN
    result = shell.run_cell(cell)
    said = "".join(capsys.readouterr())
    assert HF_TOKEN not in said + str(result.error_in_exec) and "***" in said
    assert "***" in json.loads((session.work / "eaft_run.json").read_text())["error"]


def test_an_error_without_a_token_is_shown_as_it_is(session, shell, capsys):
    session.secrets.append(HF_TOKEN)
    session._watch_cells()
    result = shell.run_cell("raise KeyError('name')")
    assert "'name'" in "".join(capsys.readouterr()) and type(result.error_in_exec) is KeyError


def test_the_session_that_replaces_another_is_the_only_one_that_watches(session, shell, monkeypatch, capsys):
    session.in_batch = False
    session._watch_cells()
    os.chdir(session.scratch)
    second = setup_cell.Session(session.run, earlier=session)
    second.in_batch = False
    second._watch_cells()
    assert second.home == session.home
    second.finish("complete")
    shell.run_cell("1 / 0")
    assert json.loads((second.work / "eaft_run.json").read_text())["status"] == "complete"
    assert capsys.readouterr().out.count("EAFT-RUN") == 1


def test_a_partial_result_that_an_earlier_session_added_to_is_kept(session):
    stored(session, "base.json", resume=True)
    (session.work / "base.json").write_text("more")
    session._link_paths()
    assert (session.work / "base.json").read_text() == "more"


def test_a_session_on_an_image_that_is_too_old_fails(session, shell, capsys):
    session.run |= {"requires": ["transformers>=99"], "deadline_seconds": 60}
    shell.user_ns["session"] = session
    try:
        shell.run_cell("session.start('')")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    found = json.loads((session.work / "eaft_run.json").read_text())
    assert found["status"] == "failed" and "missing or too old: transformers>=99 (here: " in found["error"]


def secrets_module(names, **attributes):
    """Modules by these dotted names, the last with the attributes, as sys.modules holds them."""
    modules = {name: types.ModuleType(name) for name in names}
    vars(modules[names[-1]]).update(attributes)
    return modules


def missing(*args):
    raise LookupError(f"no such secret; you are {HF_TOKEN}")


@pytest.mark.parametrize("where", ["Kaggle", "Colab"])
@pytest.mark.parametrize("there", [True, False])
def test_the_token_comes_from_the_secrets_of_the_place(session, monkeypatch, capsys, where, there):
    get = (lambda *args: HF_TOKEN if args[-1] == "HF_TOKEN" else None) if there else missing
    if where == "Kaggle":
        client = type("UserSecretsClient", (), {"get_secret": get})
        modules = secrets_module(["kaggle_secrets"], UserSecretsClient=client)
    else:
        session.on_kaggle = False
        modules = secrets_module(["google", "google.colab"], userdata=types.SimpleNamespace(get=get))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    session._take_token()
    said = capsys.readouterr().out
    assert os.environ.get("HF_TOKEN") == (HF_TOKEN if there else None) and HF_TOKEN not in said
    assert said == ("" if there else "no secret HF_TOKEN (LookupError): gated repositories cannot be read\n")
    monkeypatch.delenv("HF_TOKEN", raising=False)


# --- executed notebooks ---------------------------------------------------------------------------------------------


@pytest.fixture
def executed(scored, tmp_path):
    """An executed notebook with the scored result in its marked output, as nbformat writes it."""
    file = scored / "base.json"
    text = json.dumps(json.loads(file.read_text()), separators=(",", ":"))
    marked = {"schema": "eaft-run/1", "run": "eaft-x", "attempt": 1, "params_sha256": "p", "code_sha256": "c"}
    marked |= {"commit": "abc", "status": "complete", "error": None, "machine": {}, "results": {"base.json": text}}
    marked["files"] = {"base.json": hashlib.sha256(file.read_bytes()).hexdigest()}
    output = nbformat.v4.new_output("display_data", data={"application/json": marked})
    other = nbformat.v4.new_output("display_data", data={"application/json": {"schema": "other"}, "text/plain": "x"})
    cells = [nbformat.v4.new_code_cell("1", outputs=[other, output]), nbformat.v4.new_markdown_cell("end")]
    path = tmp_path / "executed.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_an_executed_notebook_gives_the_same_bytes(executed, scored, tmp_path):
    found, (written,) = outcome.from_notebook(executed, tmp_path / "out")
    assert written.read_bytes() == (scored / "base.json").read_bytes() and found.status == "complete"


def test_the_marked_output_is_compact(executed, scored):
    assert executed.stat().st_size < 0.35 * (scored / "base.json").stat().st_size


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda m: m.update(schema="x"), "has no output marked 'eaft-run/1'"),
        (
            lambda m: m["results"].update({"base.json": m["results"]["base.json"].replace("0", "1", 1)}),
            "was changed after",
        ),
        (lambda m: m["results"].update({"../x.json": "{}"}), "'../x.json' is not a file name"),
        (lambda m: m["results"].update({"x.sh": "{}"}), "'x.sh' is not a JSON file's"),
        (lambda m: m["results"].update({"x.json": "<html>"}), "x.json is not the JSON that a session writes"),
        (lambda m: m["results"].update({"x.json": "[NaN]"}), "x.json is not the JSON that a session writes"),
        (lambda m: m["results"].update({"x.json": 1}), "x.json is not the JSON that a session writes"),
        (lambda m: m.update(results=["x.json"]), "holds no results"),
        (lambda m: m.update(run="../x"), r"'\.\./x' is not a file name"),
        (lambda m: m.update(run=".."), r"'\.\.' is not a file name"),
        (lambda m: m.pop("files"), "is no outcome of a session: files"),
    ],
)
def test_a_notebook_without_a_sound_result_says_so(executed, tmp_path, change, words):
    content = json.loads(executed.read_text())
    change(content["cells"][0]["outputs"][1]["data"]["application/json"])
    executed.write_text(json.dumps(content))
    with pytest.raises(ResultError, match=words):
        outcome.from_notebook(executed, tmp_path / "out")
    assert not list(tmp_path.rglob("x.*"))


@pytest.mark.parametrize("content", [b"PK\x03\x04\xff\xfe", b"[1]", b'{"cells": [1, {"outputs": 2}]}', b""])
def test_a_file_that_is_no_notebook_says_so(tmp_path, content):
    (tmp_path / "x.ipynb").write_bytes(content)
    with pytest.raises(ResultError, match=r"x\.ipynb (is not JSON|has no output marked)"):
        outcome.from_notebook(tmp_path / "x.ipynb")


def test_results_of_several_notebooks_in_one_folder_do_not_replace_each_other(executed, scored):
    _, (written,) = outcome.from_notebook(executed)
    assert written == executed.parent / "eaft-x" / "base.json"
    assert outcome.from_notebook(executed)[1] == [written]  # the same again
    written.write_text("another run's")
    with pytest.raises(ResultError, match=r"eaft-x/base\.json is there with other content; move it away"):
        outcome.from_notebook(executed)
    assert written.read_text() == "another run's"


def test_a_ranking_and_what_it_chooses_run_on_an_offline_image_of_the_earlier_layout(here, server, forks, monkeypatch):
    """Executed: the wheel mounted, internet off; rankings come back checked like results, and go along with a sweep."""
    monkeypatch.setattr(build, "WHEEL_LIMIT", 1000)
    server.session, server.forks, server.old_layout = server.execute_in_fork, forks, True
    settings = here / "params" / "kaggle.yaml"
    settings.write_text(settings.read_text().replace("internet: true", "internet: false"))
    names = ("model", "packs", "device", "dtype")
    values = {k: TINY[k] for k in names} | {
        "seq_len": 40,
        "num_blocks": 3,
        "criteria": ["reap", "recon"],
        "recon_tokens": 9,
        "out_dir": "o/rank",
    }
    file = here / "params" / "rank.yaml"
    file.write_text(yaml.safe_dump(values))
    service = Service()
    (entry,) = submit([Path("params/rank.yaml")], service)
    version = server.wait(entry.run)
    assert version.request.get("enableInternet") is False and run_of(version)["internet"] is False
    (entry,) = pulling.pull(service)
    assert entry.state == "verified", entry.steps[-1].note + version.log
    assert set(ledger.find(entry.run).results) == {"ranking.json", "saliency.parquet", "trace.safetensors"}
    ranking = json.loads((entry.result_folder / "ranking.json").read_text())
    assert set(ranking["criteria"]) == {"reap", "recon"}
    for where, name, value in [
        ("provenance", "model_id", "tiny/other"),
        ("provenance", "seq_len", 41),
        ("provenance", "recon_tokens", 10),
        ("criteria", "msan", ranking["criteria"]["reap"]),
    ]:
        changed = here / "ranking.json"
        changed.write_text(json.dumps(world.sealed(ranking | {where: ranking[where] | {name: value}})))
        with pytest.raises(ResultError, match=f"ranking.json: {name if where == 'provenance' else where} "):
            JOBS["01_rank"].verify(changed, entry)

    shutil.copytree(entry.result_folder, here / "o" / "rank")
    keep = {"ranking": "o/rank/ranking.json", "criterion": "reap", "keep_n": 4}
    sweep = write_params(
        here, "sweep", label=None, keep_set=[{"label": "base"}, {"label": "reap-4"} | keep], seq_lens=[24]
    )
    (entry,) = submit([Path(sweep)], service)
    version = server.wait(entry.run)
    (entry,) = pulling.pull(service)
    assert entry.state == "verified", entry.steps[-1].note + version.log
    base, pruned = results.read_all([str(entry.result_folder)])
    assert (base.label, pruned.label) == ("base", "reap-4")
    assert base.meta["keep_set"] is None and pruned.meta["keep_set"]["criterion"] == "reap"


def test_no_name_of_a_file_is_executed_on_the_way_to_a_notebook(here):
    """papermill's injection would take it for code; a name is refused before a notebook is made."""
    hostile = "model = 'x'; __import__('pathlib').Path('owned').touch(); y"
    file = Path("params/hostile.yaml")
    file.write_text(f'"{hostile}": 1\nlabel: base\n')
    with pytest.raises(ParameterError, match=r"params/hostile\.yaml: its names .*fit no notebook"):
        build.plan(file, build.read_settings())
    assert not list(here.rglob("owned"))
