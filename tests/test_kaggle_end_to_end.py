"""The unmodified client against a loopback Kaggle that really executes what is pushed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from kaggle_server import KaggleServer, copy_project, session_environment

ROOT = Path(__file__).parents[1]
TINY = {
    "model": "tiny/model", "packs": "tiny/packs", "label": "base", "only": ["UNION", "pack_a"], "seq_lens": [24, 40],
    "num_blocks": 3, "device": "cpu", "dtype": "float32", "out_dir": "outputs/tiny",
}  # fmt: skip
CHECK_ENDPOINT = """
import requests
from kaggle import api
endpoint = api.build_kaggle_client().http_client()._endpoint
assert endpoint == "http://localhost", endpoint
assert requests.utils.get_environ_proxies("http://localhost/")["http"].startswith("http://127.0.0.1:")
"""


@pytest.fixture
def project(tmp_path, model_folder, packs_folder):
    """A folder to start commands in, with the tiny model and packs of the tests."""
    folder = copy_project(tmp_path / "project", ROOT)
    (folder / "tiny").mkdir()
    (folder / "tiny" / "model").symlink_to(model_folder)
    (folder / "tiny" / "packs").symlink_to(packs_folder)
    return folder


@pytest.fixture
def server(tmp_path):
    server = KaggleServer(tmp_path / "server")
    yield server
    server.close()


def write_params(project, name, **values):
    file = project / "params" / "tiny" / f"{name}.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump(values))
    return f"params/tiny/{name}.yaml"


def command(project, server, *arguments, status=0):
    """Run ``python -m eaftlib`` against the server, and only against it; returns what it printed."""
    home = project.parent / "home"
    home.mkdir(exist_ok=True)
    environment = session_environment(home) | server.environment(home)
    subprocess.run([sys.executable, "-c", CHECK_ENDPOINT], env=environment, check=True)
    done = subprocess.run(
        [sys.executable, "-m", "eaftlib", *arguments],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    print(done.stdout + done.stderr)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_push_poll_pull(project, server):
    params = write_params(project, "eval", **TINY)
    command(project, server, "kaggle", "push", params)
    (run,) = server.kernels
    version = server.wait(run)
    print(version.log[-3000:])
    command(project, server, "kaggle", "status")
    command(project, server, "kaggle", "pull")
    print(json.loads((project / "kaggle_runs" / run / "run.json").read_text()))
    os.system(f"find {project}/kaggle_runs | xargs ls -lad; find {version.folder} | grep -v lib/")
    assert 0
