"""Checkpoints published to, and models and packs fetched from, a loopback hub, by the unmodified client.

Everything that talks to the hub runs in a process of its own: the client reads its endpoint when it is imported.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import world
from forking import Forks
from hub_server import TOKEN, Fault, serving

from eaftlib.__main__ import main
from eaftlib.evaluation.evaluate import evaluate
from eaftlib.model import writer
from eaftlib.model.checkpoint import Checkpoint
from eaftlib.pruning.keepsets import KeepSet
from eaftlib.pruning.slicing import prune
from eaftlib.text.packs import PackSource

ROOT = Path(__file__).parents[1]
NAME = "tester/demo-16"
GATES = {
    "schema": "eaft-gates/1", "name": "demo-gates", "primary_pack": "UNION", "primary_seq_lens": [64, 128],
    "limits": {"ppl_absolute": 0.25, "ppl_relative": 0.05, "cc_rate": 0.002, "mean_prob": 0.02, "js2d": 0.02},
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory, cpu):
    """The demo model with every other expert, in four shards, its result, the baseline's, and gates."""
    folder = tmp_path_factory.mktemp("made")
    whole = Checkpoint(str(ROOT / "demo" / "model"))
    ids = np.tile(np.arange(0, whole.num_experts, 2), (whole.num_layers, 1))
    keep = KeepSet(ids, whole.num_experts, {"criterion": "reap", "keep_n": 16, "ranking_rows": "calib"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "SHARD_BYTES", 1_500_000)
        prune(whole, keep, folder / "pruned", progress=False)
    packs = PackSource(str(ROOT / "demo" / "packs"))
    settings = {"only": ["UNION"], "rows": "eval", "seq_lens": [64, 128], "num_blocks": 2, "progress": False}
    for model, label in ((whole, "base"), (Checkpoint(str(folder / "pruned")), "half")):
        evaluate(model, packs, cpu, {label: None}, out_dir=folder / "results", **settings)
    (folder / "gates.json").write_text(json.dumps(GATES))
    assert len(list((folder / "pruned").glob("*.safetensors"))) == 4
    return folder


@pytest.fixture
def work(made, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(made, tmp_path / "work")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A hub, a home for the client's cache, and processes that know no other."""
    home = tmp_path_factory.mktemp("hub") / "home"
    with serving() as server:
        forks = Forks(os.environ | server.environment(home) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
        yield server, home, forks
        forks.close()


@pytest.fixture
def hub(served):
    """The hub with nothing on it, and nothing in the cache."""
    server, home, _ = served
    server.reset()
    shutil.rmtree(home, ignore_errors=True)
    return server


@pytest.fixture
def python(hub, served, tmp_path):
    """Executes code; whatever happens, the token is not in what is printed."""

    def run(code, *words, **environment):
        done = served[2].run(code, words, cwd=tmp_path, **environment)
        assert TOKEN not in done.output + done.errors
        return done

    return run


COMMAND = "import sys; from eaftlib.__main__ import main; sys.exit(main(sys.argv[1:]))"


def words(work, name=NAME, *more):
    scored = ["--result", work / "results" / "half.json", "--baseline", work / "results" / "base.json"]
    return ["publish", work / "pruned", name, *scored, "--gates", work / "gates.json", *more]


@pytest.fixture
def publish(python, work):
    return lambda *more, **settings: python(COMMAND, *words(work, *more), **settings)


LOGITS = """
import sys, numpy as np, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Mxfp4Config
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True))
tokens = AutoTokenizer.from_pretrained(sys.argv[1])("The sum of 2 and 3 is", return_tensors="pt").input_ids
with torch.no_grad():
    np.save(sys.argv[2], model(tokens).logits.numpy())
"""


def test_what_is_published_loads_by_name_and_gives_the_same_logits(hub, publish, python, work, tmp_path):
    done = publish()
    assert done.returncode == 0, done.errors
    repo = hub.repos["model", NAME]
    assert done.output.splitlines()[-1] == f"{hub.endpoint}/{NAME}/commit/{repo.commits[-1][0]}"
    assert repo.private and len(repo.commits) == 2  # the empty one, and one that holds everything
    listed = json.loads((work / "pruned" / "prune_manifest.json").read_text())["sha256"]
    assert hub.files(NAME).keys() == {*listed, "prune_manifest.json", "README.md"}
    for name, content in hub.files(NAME).items():
        assert content == (work / "pruned" / name).read_bytes()
    for model, out in ((NAME, "hub.npy"), (str(work / "pruned"), "here.npy")):
        loaded = python(LOGITS, model, str(tmp_path / out))
        assert loaded.returncode == 0, loaded.errors
    from_hub, local = np.load(tmp_path / "hub.npy"), np.load(tmp_path / "here.npy")
    assert local.shape[-1] == 4096 and np.array_equal(from_hub, local)


def test_the_cards_own_snippet_runs_as_it_stands(hub, publish, python):
    assert publish().returncode == 0
    snippet = re.search(r"```python\n(.*?)```", hub.files(NAME)["README.md"].decode(), re.DOTALL)[1]
    assert f'name = "{NAME}"' in snippet
    done = python(snippet)
    assert done.returncode == 0, done.errors
    assert "<|start|>user<|message|>What is 2 + 3?" in done.output


UNJUDGED = """
import sys
from pathlib import Path
from eaftlib.publish import publish_unjudged
print(publish_unjudged(Path(sys.argv[1]), sys.argv[2]))
"""


def test_what_nobody_has_judged_says_so_until_it_is_published_with_its_verdict(hub, publish, python, work):
    done = python(UNJUDGED, work / "pruned", NAME)
    assert done.returncode == 0, done.errors
    before, sent = hub.files(NAME), list(hub.stored)
    text = before["README.md"].decode()
    assert hub.repos["model", NAME].private and "\n**Not judged yet.**" in text and "What it cost" not in text
    assert "near-lossless" not in text and f'name = "{NAME}"' in text
    assert publish().returncode == 0
    after = hub.files(NAME)
    assert [name for name in after if after[name] != before.get(name)] == ["README.md"] and hub.stored == sent
    assert "Not judged yet" not in after["README.md"].decode() and "What it cost" in after["README.md"].decode()


def test_killed_after_the_first_shard_it_goes_on_with_the_others(hub, served, publish, work, tmp_path):
    shards = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in (work / "pruned").glob("*.safetensors")}
    first = shards["model-00001-of-00004.safetensors"]
    released = threading.Event()
    hub.faults = [Fault(f"PUT /storage/(?!{first})", wait=released, times=99)]
    forks = served[2]
    process = forks.start(COMMAND, words(work), cwd=tmp_path)
    wait_for(lambda: hub.stored == [first])
    os.kill(process, signal.SIGKILL)
    assert forks.wait() == -signal.SIGKILL
    released.set()
    assert len(hub.repos["model", NAME].commits) == 1  # nobody sees a part of a checkpoint
    hub.faults = []
    done = publish()
    assert done.returncode == 0, done.errors
    assert sorted(hub.stored) == sorted(shards.values())  # each once
    assert {name: hashlib.sha256(hub.files(NAME)[name]).hexdigest() for name in shards} == shards
    again = publish()
    assert again.returncode == 0 and len(hub.stored) == 4 and len(hub.repos["model", NAME].commits) == 2


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def test_large_files_may_be_taken_in_parts(hub, publish, work):
    hub.reset(chunk_size=400_000)
    done = publish()
    assert done.returncode == 0, done.errors
    sizes = [f.stat().st_size for f in (work / "pruned").glob("*.safetensors")]
    assert len(hub.requests(r"^PUT /storage/\w+/\d+$")) == sum(-(-size // 400_000) for size in sizes) > 8
    for name, content in hub.files(NAME).items():
        assert content == (work / "pruned" / name).read_bytes()


@pytest.mark.parametrize(
    "fault",
    [
        Fault("PUT /storage/", status=500),
        Fault("POST .*/objects/batch", status=503),
        Fault("POST .*/preupload/", status=502),
    ],
    ids=lambda fault: fault.pattern,
)
def test_one_error_of_the_server_is_outlived(hub, publish, fault):
    hub.faults = [fault]
    done = publish()
    assert done.returncode == 0, done.errors
    assert fault.times == 0 and len(hub.files(NAME)) > 8


@pytest.mark.parametrize("fault", [{"status": 500}, {"wait": threading.Event()}], ids=["error", "broken connection"])
def test_a_commit_that_fails_is_explained_and_repeated_without_sending_again(hub, publish, fault):
    if event := fault.get("wait"):
        event.set()
    hub.faults = [Fault("POST .*/commit/", **fault)]
    done = publish()
    assert done.returncode == 1 and "Traceback" not in done.errors
    assert re.search(rf"{NAME} is not published: .*Repeat the command", done.errors, re.DOTALL)
    assert publish().returncode == 0
    assert len(hub.stored) == 4 and len(hub.files(NAME)) > 8


def test_a_wrong_token_and_none_are_told_apart_and_not_shown(hub, publish):
    wrong = publish(HF_TOKEN="hf_wrongWRONGwrong")
    assert wrong.returncode == 1 and "401" in wrong.errors and "hf_wrong" not in wrong.output + wrong.errors
    none = publish(HF_TOKEN="")
    assert none.returncode == 1 and "set HF_TOKEN" in none.errors
    assert not hub.repos


def test_public_is_what_was_asked_for_and_nothing_changes_by_accident(hub, publish):
    assert publish(NAME, "--public").returncode == 0
    assert not hub.repos["model", NAME].private
    refused = publish()
    assert refused.returncode == 1 and f"{NAME} is there and public, not private" in refused.errors


def test_a_repository_with_other_files_is_left_alone(hub, publish):
    hub.add("model", NAME, {".gitattributes": b"", "model.safetensors": b"another model"}, private=True)
    refused = publish()
    assert refused.returncode == 1 and "none of this checkpoint's: model.safetensors" in refused.errors
    assert hub.files(NAME).keys() == {".gitattributes", "model.safetensors"} and not hub.stored


def change(path, **meta):
    content = json.loads(path.read_text())
    content["meta"] |= meta
    path.write_text(json.dumps(content))


def cut_a_length(work):
    path = work / "results" / "half.json"
    content = json.loads(path.read_text())
    del content["packs"][0]["seq"]["128"]
    path.write_text(json.dumps(content))


def flip_a_bit(work):
    path = work / "pruned" / "model-00002-of-00004.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    sha = Checkpoint(str(work / "pruned")).sha256
    change(work / "results" / "half.json", model_sha256=sha)  # so that nothing else gives it away


REFUSALS = {
    "another model's result": (
        lambda work: change(work / "results" / "half.json", model_sha256="0" * 64),
        r"half\.json is not a result of the checkpoint .*pruned: its model_sha256 is 0{64}, expected",
    ),
    "another baseline": (
        lambda work: change(work / "results" / "base.json", model_sha256="0" * 64),
        r"base\.json is not a result of its source, .*demo/model",
    ),
    "a keep-set's result": (
        lambda work: change(work / "results" / "half.json", bytes_total=5),
        r"half\.json scores a keep-set of the checkpoint .*, 5 of its \d+ bytes",
    ),
    "other rows": (
        lambda work: change(work / "results" / "half.json", rows="all"),
        r"half cannot be compared with base on UNION at 64: rows is all against eval",
    ),
    "no verdict": (cut_a_length, r"half\.json and .*base\.json give no verdict: UNION at \[128\] is missing"),
    "a changed weight": (flip_a_bit, r"model-00002-of-00004\.safetensors is not the file that was written"),
    "a changed text": (
        lambda work: (work / "pruned" / "chat_template.jinja").write_text("x"),
        r"chat_template\.jinja is not the file that was written",
    ),
    "a lost file": (
        lambda work: (work / "pruned" / "chat_template.jinja").unlink(),
        r"chat_template\.jinja is not the file that was written: its SHA-256 is no such file",
    ),
    "no manifest": (lambda work: (work / "pruned" / "prune_manifest.json").unlink(), r"has no prune_manifest\.json"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_may_not_be_published_is_refused_before_the_hub_hears_of_it(work, case, monkeypatch, capsys):
    spoil, message = REFUSALS[case]
    spoil(work)
    assert not asked_hub(words(work), monkeypatch)
    assert re.search(message, capsys.readouterr().err)


def asked_hub(arguments, monkeypatch):
    """Whether the command went so far."""
    asked = []
    monkeypatch.setattr("eaftlib.publish._send", lambda *a: asked.append(a) or "there")
    return main(list(map(str, arguments))) == 0 and bool(asked)


def test_the_name_must_be_one_and_a_result_is_required(work, monkeypatch, capsys):
    assert asked_hub(words(work), monkeypatch)
    assert not asked_hub(words(work, "https://x/y"), monkeypatch)
    assert "expected owner/name" in capsys.readouterr().err
    without = [w for w in words(work) if w not in ("--result", work / "results" / "half.json")]
    with pytest.raises(SystemExit):
        asked_hub(without, monkeypatch)


# downloads

FETCH_MODEL = (
    "import sys; from eaftlib.model.checkpoint import Checkpoint; c = Checkpoint(sys.argv[1]); "
    "print(c.sha256, c.revision)"
)
FETCH_PACKS = (
    "import sys; from eaftlib.text.packs import PackSource; s = PackSource(sys.argv[1], sys.argv[2:] or None); "
    "print(s.pack_files, len(list(s.rows('UNION'))))"
)


def test_a_checkpoint_is_fetched_by_name_and_is_the_same_model(hub, python, model_folder):
    hub.add("model", "tester/tiny", {f.name: f.read_bytes() for f in model_folder.iterdir()})
    done = python(FETCH_MODEL, "tester/tiny")
    oid = hub.repos["model", "tester/tiny"].commits[-1][0]
    assert done.output.split() == [Checkpoint(str(model_folder)).sha256, oid], done.errors


def test_a_download_that_broke_off_goes_on_where_it_stopped(hub, python, tmp_path):
    """The client keeps what it has in pieces of 10 MiB: the file must be longer."""
    rows = 100_000
    large = torch.arange(rows * world.HIDDEN).view(rows, world.HIDDEN).bfloat16()
    long = world.state_dict() | {"model.embed_tokens.weight": large, "lm_head.weight": large.clone()}
    folder = world.write_checkpoint(tmp_path / "model", long, vocab_size=rows)
    hub.add("model", "tester/long", {f.name: f.read_bytes() for f in folder.iterdir()})
    shard = (folder / "model-00000-of-00003.safetensors").read_bytes()
    content = f"GET /content/{hashlib.sha256(shard).hexdigest()}"
    hub.faults = [Fault(content, cut_after=11 << 20)]
    done = python(FETCH_MODEL, "tester/long")
    assert done.output.split()[:1] == [Checkpoint(str(folder)).sha256], done.errors
    assert [status for *_, status in hub.requests(content)] == [200, 206]


def test_packs_are_fetched_by_name(hub, python, packs_folder):
    hub.add("dataset", "tester/packs", {f"sub/{f.name}": f.read_bytes() for f in packs_folder.iterdir()})
    done = python(FETCH_PACKS, "tester/packs")
    files = [f"sub/pack_{x}.parquet" for x in "abc"]
    assert done.output.strip() == f"{files} {20 + 14 + 8}", done.errors
    chosen = python(FETCH_PACKS, "tester/packs", files[2])
    assert chosen.output.strip() == f"{files[2:]} 8", chosen.errors


def test_what_the_hub_does_not_have_is_named(hub, python, packs_folder, model_folder):
    hub.add("dataset", "tester/packs", {f.name: f.read_bytes() for f in packs_folder.iterdir()})
    hub.add("model", "tester/cut", {f.name: f.read_bytes() for f in model_folder.iterdir() if "00001" not in f.name})
    missing = {
        (FETCH_PACKS, "tester/packs", "pack_z.parquet"): r"PackError: packs: 'tester/packs' .*/pack_z\.parquet",
        (FETCH_PACKS, "tester/none"): r"PackError: packs: 'tester/none' is no local folder and could not be fetched",
        (
            FETCH_MODEL,
            "tester/none",
        ): r"CheckpointError: model: 'tester/none' is no local folder and could not be fetched",
        # names that the client itself refuses
        (FETCH_PACKS, "tester/a--b"): r"PackError: packs: 'tester/a--b' is no local folder and could not be fetched",
        (
            FETCH_MODEL,
            "tester/a--b",
        ): r"CheckpointError: model: 'tester/a--b' is no local folder and could not be fetched",
        (FETCH_MODEL, "tester/cut"): r"CheckpointError: .*shard model-00001-of-00003\.safetensors is missing",
    }
    for words, message in missing.items():
        done = python(*words)
        assert done.returncode and re.search(message, done.errors, re.DOTALL), done.errors


def test_a_private_model_needs_the_token(hub, python, model_folder):
    hub.add("model", "tester/tiny", {f.name: f.read_bytes() for f in model_folder.iterdir()}, private=True)
    assert python(FETCH_MODEL, "tester/tiny", HF_TOKEN="").returncode
    assert python(FETCH_MODEL, "tester/tiny").returncode == 0
