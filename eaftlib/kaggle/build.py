"""From a file of parameters to a push folder: one notebook that carries its parameters, its code and its set-up."""

import ast
import base64
import hashlib
import json
import os
import pprint
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import nbformat
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from pydantic import Field, field_validator

from .. import notebooks, params, project
from ..errors import KaggleError, ParameterError
from ..files import sha256, write_json
from .job import JOBS, Input
from .ledger import Entry

ROOT = Path(__file__).parents[2]  # the repository that this library is run from
SETTINGS_FILE = Path("params/kaggle.yaml")
NOTEBOOK_FILE, METADATA_FILE = "notebook.ipynb", "kernel-metadata.json"
FILES, DATA_SET_FILE = "files", "dataset-metadata.json"  # the data set that goes along with every attempt of a run
WHEEL_LIMIT = 600_000  # bytes; a larger wheel goes into a data set
NOTEBOOK_LIMIT = 950_000  # bytes of what the client sends; the service refuses 1,000,000
TITLE_LIMIT = 50  # characters of a kernel's title
FINISHING_SECONDS = 600  # between the notebook's own deadline and the end of the session
# Of the extra `notebooks`, but not needed inside a session.
_TOOLS = {"papermill", "jupytext", "nbformat", "PyYAML", "ipykernel"}
_DATA_SET, _MODEL = re.compile(r"[\w-]+/[\w-]+"), re.compile(r"[\w-]+(/[\w.-]+){3}/\d+")
_COLUMNS = 112  # of the embedded wheel's lines
ABOUT = """# {run}

| | |
|---|---|
| question | `{notebook}` with `{params_file}` |
| code | eaftlib at commit {commit}, carried in this notebook |
| attempt | {attempt} |

This notebook was built, and runs on Kaggle and in Colab as it is. To change it, change `notebooks/{notebook}.py` or the
parameters, and build again.

Whatever happens, it leaves `eaft_run.json` beside its results, and its last output holds the results themselves. Two ways
to have them:

```bash
kaggle kernels output OWNER/{run} -p FOLDER
python -m eaftlib results from-notebook EXECUTED.ipynb   # any copy with outputs; where eaftlib is installed
```
"""


class Settings(params.Parameters):
    """params/kaggle.yaml"""

    accelerator: str
    internet: bool
    session_hours: Annotated[float, Field(gt=0.5, le=12)]
    gpu_sessions: Annotated[int, Field(gt=0)]
    inputs: dict[str, str]
    wheels: str | None

    @field_validator("inputs")
    @classmethod
    def _sources(cls, inputs: dict[str, str]) -> dict[str, str]:
        for name, source in inputs.items():
            if not (_DATA_SET.fullmatch(source) or _MODEL.fullmatch(source)):
                raise ValueError(
                    f"{name}: expected owner/data-set or owner/model/framework/variation/version, the version a number, "
                    f"found {source!r}"
                )
        return inputs

    @field_validator("wheels")
    @classmethod
    def _data_set(cls, wheels: str | None) -> str | None:
        if wheels is not None and not _DATA_SET.fullmatch(wheels):
            raise ValueError(f"expected a data set's owner/name, found {wheels!r}")
        return wheels


@dataclass(frozen=True)
class Carried:
    """A local file that a run needs: its path in the parameters, where it lies, and its name in the data set."""

    name: str
    path: Path
    sha256: str
    resume: bool = False

    @property
    def stored_as(self) -> str:
        return self.name.replace("/", "__")


@dataclass(frozen=True)
class Plan:
    """What a run is. ``run`` names its folder and its kernel, and changes with code, parameters and carried files."""

    run: str
    notebook: str
    params_file: str
    parameters: dict[str, Any]
    params_sha256: str
    code_sha256: str
    commit: str
    carried: list[Carried]


def read_settings() -> Settings:
    return Settings.check(params.read_file(SETTINGS_FILE))


def plan(params_file: Path, settings: Settings) -> Plan:
    """Raises ParameterError when the file fits no notebook that can run on Kaggle, or names a path it cannot carry."""
    values = params.read_file(params_file)
    try:
        return _plan(params_file, values, settings)
    except ParameterError as error:
        raise ParameterError(f"{params_file}: {error}") from None


def build(what: Plan, settings: Settings, folder: Path, owner: str) -> None:
    """Write the push folder of a plan: the notebook, kernel-metadata.json, and a folder for the data set it needs.

    Raises KaggleError when the notebook is too large to push.
    """
    job = JOBS[what.notebook]
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as temporary:
        wheel = make_wheel(Path(temporary))
        _require_all_code(wheel, what.code_sha256, Path(temporary))
        carried = list(what.carried)
        embedded = wheel.stat().st_size <= WHEEL_LIMIT
        if not embedded:
            carried.append(Carried(wheel.name, wheel, sha256(wheel)))
        stored = [_store(folder / FILES, carried, owner)] if carried else []
        text = base64.b85encode(wheel.read_bytes()).decode() if embedded else ""
        facts = {"name": wheel.name, "sha256": sha256(wheel)}
    run = {
        "run": what.run,
        "attempt": 1,
        "params_sha256": what.params_sha256,
        "code_sha256": what.code_sha256,
        "commit": what.commit,
        "results_folder": job.folder(what.parameters),
        "brings": job.brings(what.parameters),
        "wheel": facts,
        "python": _project()["requires-python"],
        "requires": _requirements(),
        "files": _files(carried),
    }
    inputs = _mapped(what.notebook, what.parameters, settings)
    run |= _surroundings(settings, inputs, stored)
    metadata = _metadata(what.run, owner, [*inputs.values(), *stored], settings, job.gpu)
    _write(folder, _notebook(what, run, text), metadata)


def build_next(entry: Entry, previous: Path, folder: Path, settings: Settings, resume: Sequence[Carried]) -> None:
    """Write the push folder of a run's next attempt: the notebook in ``previous``, whatever has become of the code since.

    resume: what the attempts before have left; a data set of its own, so that the others are not sent again.
    """
    folder.mkdir(parents=True)
    stored = []
    if (previous / FILES).is_dir():
        shutil.copytree(previous / FILES, folder / FILES, copy_function=os.link)
        stored.append(json.loads((previous / FILES / DATA_SET_FILE).read_text())["id"])
    if resume:
        stored.append(_store(folder / "resume", resume, entry.owner, copy=os.link))
    notebook = nbformat.read(previous / NOTEBOOK_FILE, 4)
    cells = {cell.get("id"): cell for cell in notebook.cells}
    run = ast.literal_eval(ast.parse(cells["start"].source).body[0].value)
    own = {name: file for name, file in run["files"].items() if not file["resume"]}
    inputs = _mapped(entry.notebook, entry.params, settings)
    run |= {"attempt": entry.attempt, "files": own | _files(resume)} | _surroundings(settings, inputs, stored)
    cells["start"].source = _start(run)
    cells["about"].source = ABOUT.format(**run, params_file=entry.params_file, notebook=entry.notebook)
    gpu = JOBS[entry.notebook].gpu
    _write(folder, notebook, _metadata(entry.run, entry.owner, [*inputs.values(), *stored], settings, gpu))


def _mapped(notebook: str, parameters: dict[str, Any], settings: Settings) -> dict[str, str]:
    """What parameters name that lies on Kaggle, and where."""
    names = [wanted.name for wanted in JOBS[notebook].inputs(parameters)]
    return {name: settings.inputs[name] for name in names if name in settings.inputs}


def _surroundings(settings: Settings, inputs: dict[str, str], stored: Sequence[str]) -> dict[str, Any]:
    """What the set-up cell finds around it, and how long it has."""
    return {
        "internet": settings.internet,
        "deadline_seconds": session_seconds(settings) - FINISHING_SECONDS,
        "wheel_mounts": _mounts(settings.wheels) if settings.wheels else [],
        "mounts": {name: _mounts(source) for name, source in inputs.items()},
        # Named after their content, so whoever owns them: a notebook that is pushed by hand is built before that is known.
        "file_mounts": [mount for source in stored for mount in _mounts("*/" + source.split("/")[1])],
    }


def _files(carried: Sequence[Carried]) -> dict[str, dict[str, Any]]:
    return {c.name: {"stored_as": c.stored_as, "sha256": c.sha256, "resume": c.resume} for c in carried}


def _write(folder: Path, notebook: nbformat.NotebookNode, metadata: dict[str, Any]) -> None:
    text = nbformat.writes(notebook)
    # The client sends the notebook as one line of JSON.
    size = len(json.dumps(json.loads(text)))
    if size > NOTEBOOK_LIMIT:
        raise KaggleError(
            f"{metadata['title']}: the notebook has {size:,} bytes; Kaggle takes {NOTEBOOK_LIMIT:,}. Shorten its parameters."
        )
    (folder / NOTEBOOK_FILE).write_text(text)
    write_json(folder / METADATA_FILE, metadata)


def session_seconds(settings: Settings) -> int:
    return int(settings.session_hours * 3600)


def make_wheel(folder: Path) -> Path:
    """The library's wheel, the same bytes for the same sources. Built from a copy, which no stale build folder can join."""
    copy = folder / "source"
    shutil.copytree(ROOT / "eaftlib", copy / "eaftlib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy / name)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run(
        [*pip, "--disable-pip-version-check", "--wheel-dir", folder, copy],
        env=os.environ | {"SOURCE_DATE_EPOCH": "315532800"},  # the earliest time that a zip archive can hold
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise KaggleError(f"the library's wheel cannot be built: {done.stderr.strip()[-500:]}. Run make setup.")
    return next(folder.glob("*.whl"))


def _require_all_code(wheel: Path, expected: str, folder: Path) -> None:
    """Before a session is spent: what it runs must be what its results are checked against."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "wheel")
    if project.code_sha256(folder / "wheel" / "eaftlib") != expected:
        raise KaggleError(
            f"{wheel.name} differs from {ROOT / 'eaftlib'}: a file changed just now (repeat the command), or pyproject.toml's "
            "packages do not name every folder with code"
        )


def _plan(params_file: Path, values: dict[str, Any], settings: Settings) -> Plan:
    notebook = _notebook_for(values)
    if notebooks.path(notebook).with_suffix(".py") in notebooks.stale():
        raise ParameterError(f"{notebooks.path(notebook)} differs from its source; run make notebooks")
    # Only what was set: a keep-set that is a label alone must still be one when the notebook reads it.
    parameters = params.of_notebook(notebook, values).model_dump(exclude_unset=True)
    _require_inside("out_dir", parameters["out_dir"])
    if parameters.get("publish_to") and not settings.internet:
        raise ParameterError(f"publish_to: {SETTINGS_FILE} turns internet off; turn it on, or set None")
    carried = _carried(JOBS[notebook].inputs(parameters), settings)
    code = project.code_sha256()
    digest = _sha256_of(parameters)
    key = _sha256_of([code, sha256(notebooks.path(notebook)), digest, [[c.name, c.sha256] for c in carried]])
    stem = os.path.relpath(params_file.with_suffix("")).removeprefix("params/")
    stem = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")
    run = f"eaft-{stem[: TITLE_LIMIT - 14].rstrip('-')}-{key[:8]}"
    return Plan(run, notebook, str(params_file), parameters, digest, code, project.commit(ROOT), carried)


def _sha256_of(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _notebook_for(values: dict[str, Any]) -> str:
    """The notebook that knows every name in the file; of two, of which one knows all that the other does, the other."""
    known = {name: set(kind.model_fields) for name, kind in params.NOTEBOOKS.items()}
    fits = [name for name in known if set(values) <= known[name]]
    fits = [name for name in fits if not any(known[other] < known[name] for other in fits)]
    here = [name for name in fits if name in JOBS]
    if len(here) == 1:
        return here[0]
    if fits and not here:
        raise ParameterError(f"it is for {fits[0]}, which needs no GPU: run it where its files are")
    raise ParameterError(
        f"its names {sorted(values)} fit {here or 'no notebook'}, expected exactly one of {list(JOBS)}"
        + (". Give one more of those that only the right one has." if here else "")
    )


def _carried(inputs: Sequence[Input], settings: Settings) -> list[Carried]:
    """Local files of the inputs, but for those that settings.inputs finds on Kaggle."""
    carried = []
    for wanted in dict.fromkeys(inputs):
        path = Path(wanted.name)
        if wanted.name in settings.inputs or not (path.exists() or wanted.missing):
            continue  # mounted, or fetched from the hub
        _require_inside(wanted.name, wanted.name)
        if not path.exists():
            raise ParameterError(wanted.missing)
        carried += [Carried(f.as_posix(), f, sha256(f)) for f in wanted.files(path) if not f.name.startswith(".")]
    return carried


def _require_inside(name: str, path: str) -> None:
    if Path(path).is_absolute() or ".." in Path(path).parts or Path(path) == Path("."):
        raise ParameterError(f"{name}: found {path!r}; a run on Kaggle needs a path below the repository's root")


def _store(folder: Path, carried: Sequence[Carried], owner: str, copy: Callable = shutil.copy) -> str:
    """Put carried files into one flat folder, to become a data set named after its content; returns owner/name."""
    folder.mkdir()
    for c in carried:
        copy(c.path, folder / c.stored_as)
    slug = f"eaft-files-{_sha256_of([[c.stored_as, c.sha256] for c in carried])[:16]}"
    metadata = {"id": f"{owner}/{slug}", "title": slug, "licenses": [{"name": "other"}]}
    write_json(folder / DATA_SET_FILE, metadata)
    return f"{owner}/{slug}"


def _mounts(source: str) -> list[str]:
    """Where a data set or model lies under /kaggle/input: in the present layout, and in the earlier one."""
    without_owner = source.split("/", 1)[1]
    return [f"{'models' if '/' in without_owner else 'datasets'}/{source}", without_owner]


def _project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _requirements() -> list[str]:
    """Packages that a session needs."""
    extra = _project()["optional-dependencies"]["notebooks"]
    return _project()["dependencies"] + [r for r in extra if re.split(r"[<>=]", r)[0] not in _TOOLS]


def _metadata(run: str, owner: str, sources: list[str], settings: Settings, gpu: bool) -> dict[str, Any]:
    if settings.wheels:
        sources = [*sources, settings.wheels]
    return {
        "id": f"{owner}/{run}",
        "title": run,
        "code_file": NOTEBOOK_FILE,
        "language": "python",
        "kernel_type": "notebook",
        "is_private": True,
        "enable_gpu": gpu,
        "enable_internet": settings.internet,
        "machine_shape": settings.accelerator if gpu else "",
        "dataset_sources": [s for s in sources if s.count("/") == 1],
        "model_sources": [s for s in sources if s.count("/") == 4],
        "kernel_sources": [],
        "competition_sources": [],
    }


def _notebook(what: Plan, run: dict[str, Any], wheel: str) -> nbformat.NotebookNode:
    """Set-up cells, the notebook with its parameters, and a last cell that hands the result over."""
    inner = parameterize_notebook(load_notebook_node(str(notebooks.path(what.notebook))), what.parameters)
    for number, cell in enumerate(inner.cells):  # the same bytes for the same run
        cell["id"] = f"cell-{number:02}"
        cell.metadata.pop("papermill", None)
    lines = [wheel[i : i + _COLUMNS] for i in range(0, len(wheel), _COLUMNS)]
    cells = [
        _markdown("about", ABOUT.format(**run, params_file=what.params_file, notebook=what.notebook)),
        _code("set-up", Path(__file__).with_name("setup_cell.py").read_text().rstrip(), hidden=True),
        _code(
            "wheel",
            "# eaftlib itself, base85\nWHEEL = (\n" + "".join(f'    "{x}"\n' for x in lines or [""]) + ")",
            hidden=True,
        ),
        _code("start", _start(run)),
        *inner.cells,
        _markdown(
            "result",
            "## The result\n\nThe next cell's output holds every result JSON: any copy of it with outputs will do.",
        ),
        _code("finish", 'session.finish("complete")'),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def _start(run: dict[str, Any]) -> str:
    text = f"RUN = {pprint.pformat(run, sort_dicts=False, width=110)}"
    return text + '\nsession = Session(RUN, earlier=globals().get("session"))\nsession.start(WHEEL)'


def _markdown(name: str, source: str) -> nbformat.NotebookNode:
    return nbformat.v4.new_markdown_cell(source, id=name)


def _code(name: str, source: str, hidden: bool = False) -> nbformat.NotebookNode:
    # Jupyter, Kaggle and Colab each have a name of their own for a cell whose source is folded away.
    metadata = {"jupyter": {"source_hidden": True}, "_kg_hide-input": True, "cellView": "form"} if hidden else {}
    return nbformat.v4.new_code_cell(source, id=name, metadata=metadata)
