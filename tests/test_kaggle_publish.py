"""A prune and a recovery on Kaggle: published from the session to a loopback hub; what comes back, and what does not."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import kaggle_server
import numpy as np
import pytest
import test_keepsets
import yaml
from hub_server import TOKEN, serving
from kaggle_server import log_of
from test_kaggle_end_to_end import assert_no_token_is_kept
from test_kaggle_faults import impatient, submit
from test_params import PRUNE

from eaftlib.errors import ParameterError, ResultError
from eaftlib.kaggle import build, job, pulling
from eaftlib.pruning import keepsets, slicing

ranking_folder = test_keepsets.ranking_folder  # a fixture
MOUNTED = "someone/tiny-gpt-oss/transformers/default/1"
KEEP = {"ranking": "tiny/rank", "criterion": "reap", "keep_n": 4}


@pytest.fixture(scope="module")
def hub():
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def online(image, hub, tmp_path_factory):
    """Processes of an image that know this hub alone, and have no token."""
    home = tmp_path_factory.mktemp("online")
    environment = {name: value for name, value in hub.environment(home).items() if name != "HF_TOKEN"}
    forks = kaggle_server.fork_image(image, home, **environment)
    yield forks
    forks.close()


@pytest.fixture
def executed(here, server, online, ranking_folder, model_folder):
    """executed(values): a run of these parameters, executed and pulled, with the model mounted; (entry, session)."""
    server.session, server.forks, server.models[MOUNTED] = server.execute_in_fork, online, model_folder
    settings = here / "params" / "kaggle.yaml"
    settings.write_text(settings.read_text().replace("inputs:", f"inputs:\n  tiny/model: {MOUNTED}"))
    shutil.copytree(ranking_folder, here / "tiny" / "rank")

    def run(values):
        Path("params/run.yaml").write_text(yaml.safe_dump({"model": "tiny/model"} | KEEP | values))
        (entry,) = submit([Path("params/run.yaml")], impatient(call_seconds=20), say=lambda line: None)
        version = server.wait(entry.run)
        (entry,) = pulling.pull(impatient(), say=lambda line: None)
        return entry, version

    return run


LOGITS = """
import sys, numpy as np, torch
from transformers import AutoModelForCausalLM, Mxfp4Config
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True))
with torch.no_grad():
    np.save(sys.argv[2], model(torch.arange(24)[None]).logits.numpy())
"""


def test_a_prune_is_published_and_loads_with_the_logits_of_one_made_here(
    here, server, hub, online, executed, checkpoint, tmp_path
):
    entry, version = executed({"publish_to": "tester/tiny-4", "out_dir": "outputs/tiny-4"})
    assert entry.state == "verified", entry.steps[-1].note + log_of(version)
    assert set(entry.results) == {"prune_manifest.json", "expert_mapping.json"}
    assert not version.request["enableGpu"] and not version.request.get("machineShape")
    assert {f.name for f in version.working.iterdir()} == {*entry.results, "eaft_run.json"}

    keep = keepsets.from_ranking(checkpoint, **KEEP)
    local = slicing.prune(checkpoint, keep, tmp_path / "local", progress=False)
    manifest = json.loads((entry.result_folder / "prune_manifest.json").read_text())
    assert manifest["sha256"] == local["sha256"] and manifest["chosen_by"] == local["chosen_by"]
    published = hub.files("tester/tiny-4")
    assert published.keys() == {*local["sha256"], "prune_manifest.json", "README.md"}
    for name in local["sha256"]:
        assert published[name] == (tmp_path / "local" / name).read_bytes(), name
    assert hub.repos["model", "tester/tiny-4"].private
    assert "\n**Not judged yet.**" in published["README.md"].decode() and "nan" not in published["README.md"].decode()
    assert f"{hub.endpoint}/tester/tiny-4/commit/" in log_of(version)

    for model, out in (("tester/tiny-4", "hub.npy"), (tmp_path / "local", "here.npy")):
        done = online.run(LOGITS, [model, tmp_path / out], cwd=tmp_path, HF_TOKEN=TOKEN)
        assert done.returncode == 0, done.errors
    from_hub, by_itself = (np.load(tmp_path / name) for name in ("hub.npy", "here.npy"))
    assert from_hub.shape[:2] == (1, 24) and np.array_equal(from_hub, by_itself)
    assert_no_token_is_kept(here, version)


def test_a_recovery_is_published_and_brings_back_what_it_trained(here, hub, executed):
    text = {"packs": "tiny/packs", "seq_len": 40, "num_blocks": 5, "held_out_blocks": 3, "batch_blocks": 1, "steps": 1}
    where = {"device": "cpu", "dtype": "float32", "publish_to": "tester/tiny-back", "out_dir": "outputs/back"}
    entry, version = executed(text | where | {"trained": ["routers"]})
    assert entry.state == "verified", entry.steps[-1].note + log_of(version)
    assert set(entry.results) == {"recovery.json", "trained.safetensors"}
    assert not list(version.working.glob("model*"))
    published = hub.files("tester/tiny-back")
    manifest = json.loads(published["prune_manifest.json"])
    assert manifest["recovered"]["trained"] == ["routers"] and published.keys() > manifest["sha256"].keys()
    assert_no_token_is_kept(here, version)


def test_where_it_may_not_go_is_known_before_any_work(hub, executed):
    """There is such a repository, and everybody sees it."""
    hub.add("model", "tester/open", {"config.json": b"{}"})
    entry, version = executed({"publish_to": "tester/open", "out_dir": "outputs/tiny-4"})
    assert entry.state == "failed" and "tester/open is there and public, not private" in entry.steps[-1].note
    assert "keep 4 of" not in log_of(version) and hub.files("tester/open") == {"config.json": b"{}"}


def test_publishing_needs_internet(here):
    Path("params/run.yaml").write_text(yaml.safe_dump({"model": "m"} | KEEP | {"publish_to": "a/b", "out_dir": "o"}))
    settings = here / "params" / "kaggle.yaml"
    settings.write_text(settings.read_text().replace("internet: true", "internet: false"))
    with pytest.raises(ParameterError, match=r"params/run\.yaml: publish_to: params/kaggle\.yaml turns internet off"):
        build.plan(Path("params/run.yaml"), build.read_settings())


def test_names_that_are_written_here_too_are_the_librarys():
    assert (job._MANIFEST, job._MAPPING, job._MANIFEST_SCHEMA) == (
        slicing.MANIFEST, slicing.MAPPING, slicing.MANIFEST_SCHEMA,
    )  # fmt: skip


@pytest.fixture
def left(checkpoint, ranking_folder, tmp_path):
    """Manifest and mapping of a prune, and an entry that asked for it."""
    values = PRUNE | KEEP | {"keep_frac": None, "model": checkpoint.model_id}
    slicing.prune(
        checkpoint,
        keepsets.from_ranking(checkpoint, **KEEP | {"ranking": ranking_folder}),
        tmp_path / "cut",
        progress=False,
    )
    return tmp_path / "cut", SimpleNamespace(params=values)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model": "other"}, "model_id is .*, expected other"),
        ({"criterion": "ean"}, "criterion is reap, expected ean"),
        ({"keep_n": 6}, "keep_n is 4, expected 8"),
        ({"core_top_m": 1}, "core_top_m is 0, expected 1"),
        ({"keep_super": True}, "keep_super is False, expected True"),
    ],
)
def test_a_prune_of_another_choice_is_not_taken_for_this_one(left, changes, words):
    folder, entry = left
    for name in (slicing.MANIFEST, slicing.MAPPING):
        job.JOBS["02_prune"].verify(folder / name, entry)
    entry.params |= changes
    with pytest.raises(ResultError, match=words):
        job.JOBS["02_prune"].verify(folder / slicing.MANIFEST, entry)


def test_a_mapping_that_is_not_the_manifests_is_found(left):
    folder, entry = left
    mapping = json.loads((folder / slicing.MAPPING).read_text())
    mapping["0"]["0"] += 1
    (folder / slicing.MAPPING).write_text(json.dumps(mapping, indent=1) + "\n")
    with pytest.raises(ResultError, match=r"expert_mapping\.json is .*, expected"):
        job.JOBS["02_prune"].verify(folder / slicing.MANIFEST, entry)


def test_a_damaged_manifest_is_an_error_that_names_it(left):
    folder, entry = left
    for content in ("[]", "{}", '{"schema": "eaft-prune/1", "source": 3}', '{"schema": "eaft-prune/1"}'):
        (folder / slicing.MANIFEST).write_text(content)
        with pytest.raises(ResultError, match=r"prune_manifest\.json"):
            job.JOBS["02_prune"].verify(folder / slicing.MANIFEST, entry)
