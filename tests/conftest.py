import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may touch the network
os.environ["KAGGLE_API_ENVIRONMENT"] = "LOCALHOST"  # before kaggle is imported, for the same reason

import contextlib
import hashlib
import json
import shutil
from datetime import timedelta
from pathlib import Path

import kaggle_server
import pytest
import requests
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported: they then run on the CPU, one program at a time

import world
from hypothesis import settings
from transformers import AutoModelForCausalLM

from eaftlib import notebooks
from eaftlib.engine import placement
from eaftlib.evaluation.evaluate import evaluate
from eaftlib.model.checkpoint import Checkpoint
from eaftlib.text.harmony import completion_spans
from eaftlib.text.packs import PackSource, pack_blocks


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


settings.register_profile("suite", max_examples=40, deadline=None, derandomize=True)
settings.load_profile("suite")


@pytest.fixture(scope="session", autouse=True)
def _cache_of_hashes(tmp_path_factory):
    """No test, and no process that one starts, leaves anything in the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tokenizer(checkpoint):
    return checkpoint.tokenizer


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tiny random gpt-oss checkpoint in the published layout. Read only: tests that damage one copy it first."""
    return world.write_checkpoint(tmp_path_factory.mktemp("model") / "tiny-gpt-oss")


@pytest.fixture(scope="session")
def checkpoint(model_folder):
    return Checkpoint(str(model_folder))


@pytest.fixture(scope="session")
def packs_folder(tmp_path_factory):
    return world.write_packs(tmp_path_factory.mktemp("packs"))


@pytest.fixture(scope="session")
def source(packs_folder):
    return PackSource(str(packs_folder))


@pytest.fixture(scope="session")
def blocks(source, tokenizer):
    """5 blocks of 40 tokens: above the sliding window of 16, no multiple of it."""
    return pack_blocks(source, "UNION", tokenizer, completion_spans, seq_len=40, num_blocks=5)


@pytest.fixture(scope="session")
def cpu():
    return placement.place("cpu", "float32")


@pytest.fixture(scope="session")
def hf_model(model_folder):
    """The same checkpoint as transformers loads and runs it, in float32 with eager attention."""
    return world.load_with_transformers(AutoModelForCausalLM, model_folder)


@pytest.fixture
def project(tmp_path, model_folder, packs_folder):
    """A folder to start Kaggle commands in, with the tiny model and packs."""
    folder = kaggle_server.copy_project(tmp_path / "project", Path(__file__).parents[1])
    return link_tiny(folder, model_folder, packs_folder)


def link_tiny(folder, model_folder, packs_folder):
    (folder / "tiny").mkdir()
    (folder / "tiny" / "model").symlink_to(model_folder)
    (folder / "tiny" / "packs").symlink_to(packs_folder)
    return folder


@pytest.fixture(scope="session")
def image(tmp_path_factory):
    """The interpreter that executes sessions: what they need of this project they must bring."""
    return kaggle_server.make_image(tmp_path_factory.mktemp("image") / "venv")


@pytest.fixture(scope="session")
def forks(image, tmp_path_factory):
    """Sessions in processes that begin with torch loaded."""
    forks = kaggle_server.fork_image(image, tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()


@pytest.fixture
def server(tmp_path, image):
    server = kaggle_server.KaggleServer(tmp_path / "server", image=image)
    yield server
    server.close()


@pytest.fixture(scope="session")
def scored(model_folder, packs_folder, cpu, tmp_path_factory):
    """What the notebook of the tiny parameters writes: the result's two files."""
    folder = link_tiny(tmp_path_factory.mktemp("scored"), model_folder, packs_folder)
    settings = {"seq_lens": [24, 40], "num_blocks": 3, "only": ["UNION", "pack_a"], "progress": False}
    with contextlib.chdir(folder):
        evaluate(
            Checkpoint("tiny/model"), PackSource("tiny/packs"), cpu, {"base": None}, out_dir=folder / "out", **settings
        )
    return folder / "out"


@pytest.fixture
def play(scored):
    """A session that ends at once with what the real one would have written; ``change`` is given to spoil it."""

    def session(version, status="COMPLETE", change=lambda folder, content: None, **outcome):
        run = kaggle_server.run_of(version)
        for file in scored.iterdir():
            shutil.copy(file, version.working)
        content = {k: run[k] for k in ("run", "attempt", "params_sha256", "code_sha256", "commit")}
        content |= {"schema": "eaft-run/1", "status": "complete", "error": None, "machine": {}}
        change(version.working, content)
        files = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in version.working.iterdir()}
        text = json.dumps(content | {"files": files} | outcome)
        (version.working / "eaft_run.json").write_text(text)
        version.log = json.dumps([{"stream_name": "stdout", "time": 1.5, "data": "EAFT-RUN\n"}])
        return status

    return session


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    from eaftlib.kaggle import build

    return build.make_wheel(tmp_path_factory.mktemp("wheel"))


GENERATED = {}  # text of a percent script -> of its notebook


def generated_once(source, generated=notebooks.generated):
    text = source.read_text()
    if text not in GENERATED:
        GENERATED[text] = generated(source)
    return GENERATED[text]


@pytest.fixture
def here(project, server, play, wheel, monkeypatch, tmp_path):
    """Work in the project folder with a client that can only reach the loopback server, whose sessions are played."""
    server.session = play
    from eaftlib.kaggle import build, pushing

    monkeypatch.setattr(pushing, "SETTLE", timedelta(seconds=0.3))
    # Once is enough, for as long as the sources are the same.
    monkeypatch.setattr(build, "make_wheel", lambda folder: wheel)
    monkeypatch.setattr(build, "_require_all_code", lambda wheel, expected, folder: None)
    monkeypatch.setattr(notebooks, "generated", generated_once)
    monkeypatch.chdir(project)
    home = tmp_path / "home"
    home.mkdir()
    for name, value in server.environment(home).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("KAGGLE_API_TOKEN", raising=False)
    import kaggle

    assert kaggle.api.build_kaggle_client().http_client()._endpoint == "http://localhost"
    assert requests.utils.get_environ_proxies("http://localhost/")["http"] == f"http://127.0.0.1:{server.port}"
    return project
