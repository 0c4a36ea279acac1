"""The set-up cell on images that are too old: pip is real, the packages are tiny ones of the same names."""

import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import kaggle_server
import minimum
import pytest
from packaging.requirements import Requirement

from eaftlib.kaggle import build, setup_cell

ROOT = Path(__file__).parents[1]

# What the image has, and what can be installed: the newest transformers needs a newer torch, the one before a newer hub.
IMAGE = [("torch", "2.10.0+cu128", []), ("transformers", "4.57.1", []), ("huggingface_hub", "0.36.0", [])]
OFFERED = [
    ("torch", "99.0", []),
    ("transformers", "99.1", ["huggingface_hub>=90", "torch>=2.4"]),
    ("transformers", "99.2", ["huggingface_hub>=90", "torch>=98"]),
    ("huggingface_hub", "98.0", []),
]
SESSION = """
import json, sys
sys.path.insert(0, sys.argv[1])
import setup_cell
exec(sys.argv[3])
session = setup_cell.Session(json.loads(sys.argv[2]))
session._require_packages()
import torch, transformers, huggingface_hub
print(torch.VERSION, transformers.VERSION, huggingface_hub.VERSION)
"""


def write_wheel(folder, name, version, requires):
    """A package of one line that says its version."""
    info = f"{name}-{version}.dist-info"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *(f"Requires-Dist: {r}" for r in requires)]
    files = {
        f"{name}/__init__.py": f"VERSION = {version!r}\n",
        f"{info}/METADATA": "\n".join(metadata) + "\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/top_level.txt": f"{name}\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in files.items():
            archive.writestr(file, content)
    return path


@pytest.fixture
def old_image(image, tmp_path):
    """An interpreter of its own, with older packages in front of those that tests run with."""
    shutil.copytree(image.parents[1], tmp_path / "venv", symlinks=True)
    (places,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    for package in IMAGE:
        zipfile.ZipFile(write_wheel(tmp_path, *package)).extractall(places)
    return tmp_path / "venv" / "bin" / "python"


@pytest.fixture
def offered(tmp_path):
    """The wheels as a data set's folder, and as an index."""
    folder = tmp_path / "input" / "datasets" / "o" / "w"
    folder.mkdir(parents=True)
    for name, *more in OFFERED:
        wheel = write_wheel(folder, name, *more)
        page = tmp_path / "index" / name.replace("_", "-") / "index.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        with page.open("a") as opened:
            opened.write(f'<a href="{wheel.as_uri()}">{wheel.name}</a>')
    return folder


@pytest.fixture
def start(old_image, offered, tmp_path):
    """Runs the set-up cell's look at packages in a process of that image; ``before``: what its kernel did before."""
    run = dict.fromkeys(("run", "attempt", "params_sha256", "code_sha256", "commit"), "x")
    run |= {"python": ">=3.11", "requires": ["torch>=2.10", "transformers>=99"]}
    environment = kaggle_server.session_environment(tmp_path) | {"KAGGLE_KERNEL_RUN_TYPE": "Batch"}
    environment |= {"PIP_INDEX_URL": (tmp_path / "index").as_uri(), "PIP_CONFIG_FILE": os.devnull}
    (tmp_path / "working").mkdir()

    def run_session(before="", **settings):
        words = [Path(setup_cell.__file__).parent, json.dumps(run | settings), before]
        return subprocess.run(
            [old_image, "-c", SESSION, *words],
            cwd=tmp_path / "working",
            env=environment,
            capture_output=True,
            text=True,
        )

    return run_session


@pytest.mark.parametrize("internet", [True, False])
def test_what_is_too_old_is_replaced_in_one_line_and_torch_is_not(start, offered, internet):
    done = start(internet=internet, wheel_mounts=[] if internet else ["datasets/o/w"])
    source = "the internet" if internet else offered
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"installing transformers>=99 (here: 4.57.1) from {source}",
        "2.10.0+cu128 99.1 98.0",
    ]


def test_what_the_kernel_has_imported_is_not_replaced_under_it(start):
    """The newer transformers needs a newer hub, of which the kernel would go on with the older modules."""
    done = start("import huggingface_hub", internet=False, wheel_mounts=["datasets/o/w"])
    assert done.returncode == 1
    assert "restart the kernel and run all again" in done.stderr
    assert "huggingface-hub==0.36.0" in done.stderr.replace("_", "-"), done.stderr
    assert start(requires=[]).stdout == "2.10.0+cu128 4.57.1 0.36.0\n"


def test_a_torch_that_is_too_old_is_never_replaced(start):
    done = start(requires=["torch>=98"], internet=True, wheel_mounts=["datasets/o/w"])
    words = "this image is too old: it does not meet torch>=98 (here: 2.10.0+cu128). Choose a newer image."
    assert done.returncode == 1 and words in done.stderr
    assert start(requires=[]).stdout == "2.10.0+cu128 4.57.1 0.36.0\n"


def test_the_stated_minimum_is_what_a_session_requires_and_what_is_tested():
    """The page's first row, the set-up cell's requirements and `make test-minimum` name one version of each package."""
    lines = (ROOT / "docs" / "kaggle.md").read_text().splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("| tested |"))
    header, lowest = ([cell.strip() for cell in lines[i].strip("|").split("|")] for i in (head, head + 2))
    stated = dict(zip(header, lowest, strict=True))
    required = {Requirement(r).name: Requirement(r).specifier for r in build._requirements()}
    installed = {Requirement(r).name: Requirement(r).specifier for r in minimum.lowest()}
    for name, column in (("torch", "PyTorch"), ("transformers", "transformers"), ("datasets", "datasets")):
        assert installed[name].contains(stated[column]), name
    bounded = {name: str(s) for name, s in required.items() if str(s)}
    assert bounded == {name: str(installed[name]).replace("==", ">=") for name in bounded}
