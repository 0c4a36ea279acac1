"""A pass that is killed goes on from its journal: whatever was left, the results have the bytes of an undisturbed run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import world
from test_evaluation import keep_set
from test_forward import keep_masks

from eaftlib.engine import journal as module
from eaftlib.engine import traversal, weights
from eaftlib.engine.journal import FOLDER, Journal, Part
from eaftlib.engine.traversal import Traversal
from eaftlib.evaluation.evaluate import evaluate
from eaftlib.pruning.trace import TRACE, Trace, record
from eaftlib.text.packs import pack_blocks

BLOCKS = 7
SETTINGS = {"seq_lens": [24, 40], "num_blocks": BLOCKS, "only": ["UNION"], "rows": "all", "progress": False}


@pytest.fixture(autouse=True)
def _a_wave_and_a_part_for_every_block(monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.0)
    monkeypatch.setitem(traversal.MICRO_BATCH_TOKENS, "cpu", 40)  # one block at a time, at either length


@pytest.fixture(params=["resident", "streamed"])
def layers(request, monkeypatch):
    if request.param == "streamed":
        monkeypatch.setattr(weights, "RESIDENT_SHARE", 0.0)
        monkeypatch.setattr(traversal, "WAVE_TOKENS", 2 * 2 * 40)  # two blocks of two variants; alone, four


class Killed(BaseException):
    """As nothing in the library catches it: what is not on disk is lost."""


@pytest.fixture
def kill(monkeypatch):
    """kill(n): let the n-th micro-batch of a layer from now on be the last that is done; None: none is."""
    forward, count = Traversal.forward, {"left": None, "done": 0}

    def counted(self):
        for tokens in forward(self):
            count["done"] += 1
            if count["left"] is not None and count["done"] >= count["left"]:
                raise Killed
            yield tokens

    monkeypatch.setattr(Traversal, "forward", counted)

    def arm(left):
        count.update(left=left, done=0)
        return count

    return arm


def evaluated(checkpoint, source, cpu, out, **settings):
    keep = keep_set(keep_masks(1, 4)[0], ranking_rows="calib", ranking_sha256="abc")
    return evaluate(checkpoint, source, cpu, {"base": None, "half": keep}, out_dir=out, **(SETTINGS | settings))


def written(folder):
    """Every file's bytes, but for how fast a pass was."""
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".parquet"}
    for path in folder.glob("*.json"):
        content = json.loads(path.read_text())
        for pack in content["packs"]:
            for entry in pack["seq"].values():
                del entry["model"]["tok_s_pred"]
        found[path.name] = json.dumps(content).encode()
    return found


def steps_of_one(checkpoint, source, cpu, out, kill):
    """Micro-batches of layers that a whole evaluation has."""
    count = kill(None)
    evaluated(checkpoint, source, cpu, out)
    return count["done"]


@pytest.mark.parametrize("nth", range(4))
def test_killed_again_and_again_at_every_fourth_step(checkpoint, source, cpu, tmp_path, kill, layers, nth):
    """Every number of steps is the last of some run: nth, nth + 4, ...; each run goes on from what the former left."""
    whole = steps_of_one(checkpoint, source, cpu, tmp_path / "whole", kill)
    assert whole == 2 * BLOCKS * world.LAYERS * 2  # lengths, blocks, layers, variants
    runs, killed = 0, True
    while killed:
        runs += 1
        assert runs < 60
        kill(nth + 1 + 4 * runs)
        try:
            evaluated(checkpoint, source, cpu, tmp_path / "out")
            killed = False
        except Killed:
            pass
    assert runs > 3 and written(tmp_path / "out") == written(tmp_path / "whole")
    assert not (tmp_path / "out" / FOLDER).exists()


def test_what_was_finished_is_not_computed_again(checkpoint, source, cpu, tmp_path, kill, layers):
    whole = steps_of_one(checkpoint, source, cpu, tmp_path / "whole", kill)
    kill(whole // 4)  # in the middle of the first of two passes
    with pytest.raises(Killed):
        evaluated(checkpoint, source, cpu, tmp_path / "out")
    count = kill(None)
    evaluated(checkpoint, source, cpu, tmp_path / "out")
    steps_of_a_wave = world.LAYERS * 2 * 4  # of at most four blocks
    assert whole - whole // 4 <= count["done"] <= whole - whole // 4 + steps_of_a_wave


def test_a_ranking_goes_on_with_experts_and_grams(checkpoint, source, cpu, tmp_path, kill, layers):
    spans = checkpoint.family.completion_spans
    blocks = pack_blocks(source, "UNION", checkpoint.tokenizer, spans, seq_len=40, num_blocks=BLOCKS)

    def rank(out):
        return record(checkpoint, blocks, cpu, recon_tokens=11, out_dir=out, progress=False)[0]

    kill(None)
    whole = rank(tmp_path / "whole")
    assert whole.grams.any() and whole.norm.any()
    for left in (5, 9, 12):
        kill(left)
        with pytest.raises(Killed):
            rank(tmp_path / "out")
    kill(None)
    rank(tmp_path / "out")
    for name, values in vars(Trace.load(tmp_path / "whole" / TRACE)).items():  # whose header has no fixed order
        found = getattr(Trace.load(tmp_path / "out" / TRACE), name)
        assert np.array_equal(found, values) and type(found) is type(values), name
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [TRACE]


def half_done(checkpoint, source, cpu, out, kill, steps=2 * 2 * 5 * world.LAYERS // 2):
    """An evaluation killed in its first pass; the paths of its parts."""
    kill(steps)
    with pytest.raises(Killed):
        evaluated(checkpoint, source, cpu, out)
    kill(None)
    parts = sorted((out / FOLDER).rglob("*.safetensors"))
    assert parts
    return parts


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


def of_another_pass(path):
    path.write_bytes(path.read_bytes().replace(b"UNION", b"UNIOM"))


@pytest.mark.parametrize("damage", [cut_short, flip_a_bit, empty, of_another_pass])
def test_a_damaged_part_is_named_removed_and_computed_again(checkpoint, source, cpu, tmp_path, kill, damage):
    evaluated(checkpoint, source, cpu, tmp_path / "whole")
    part = half_done(checkpoint, source, cpu, tmp_path / "out", kill)[0]
    damage(part)
    with pytest.warns(UserWarning, match=rf"{part.name} cannot be gone on from, and is removed"):
        evaluated(checkpoint, source, cpu, tmp_path / "out")
    assert written(tmp_path / "out") == written(tmp_path / "whole")


@pytest.mark.parametrize("change", [{"rows": "calib"}, {"entropy_topk": 5}, {"cc_quantile": 0.2}, {"num_blocks": 6}])
def test_another_evaluation_sees_nothing_of_it(checkpoint, source, cpu, tmp_path, kill, change):
    half_done(checkpoint, source, cpu, tmp_path / "out", kill)
    evaluated(checkpoint, source, cpu, tmp_path / "whole", **change)
    evaluated(checkpoint, source, cpu, tmp_path / "out", **change)
    assert written(tmp_path / "out") == written(tmp_path / "whole")


def test_an_interrupt_writes_what_is_done(checkpoint, source, cpu, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 3600.0)
    run, calls = traversal.Traversal._forward_wave, []

    def interrupted(self, wave):
        calls.append(wave)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return run(self, wave)

    monkeypatch.setattr(traversal.Traversal, "_forward_wave", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluated(checkpoint, source, cpu, tmp_path)
    assert [path.name for path in (tmp_path / FOLDER).rglob("*.safetensors")] == ["0-3.safetensors"]


PROGRAM = """
import os, signal, sys
from eaftlib.engine import journal, traversal
from eaftlib.engine.placement import place
from eaftlib.evaluation.evaluate import evaluate
from eaftlib.model.checkpoint import Checkpoint
from eaftlib.text.packs import PackSource

journal.SECONDS, traversal.MICRO_BATCH_TOKENS["cpu"] = 0.0, 40
model, packs, out, left = sys.argv[1:]
write = journal.save_file

def killed(tensors, path, metadata):
    global left
    if (left := int(left) - 1) == 0:
        open(path, "wb").write(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)
    write(tensors, path, metadata)

journal.save_file = killed
evaluate(
    Checkpoint(model), PackSource(packs), place("cpu", "float32"), {"base": None}, out_dir=out, seq_lens=[40], num_blocks=7,
    only=["UNION"], progress=False,
)
"""


def test_a_process_killed_while_it_writes_a_part(model_folder, packs_folder, tmp_path):
    def run(left, out):
        command = [sys.executable, "-c", PROGRAM, model_folder, packs_folder, out, str(left)]
        settings = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        return subprocess.run(command, env=settings, capture_output=True, text=True)

    assert run(4, tmp_path / "out").returncode == -signal.SIGKILL
    for out in ("out", "whole"):
        done = run(0, tmp_path / out)
        assert done.returncode == 0, done.stderr
    assert written(tmp_path / "out") == written(tmp_path / "whole")
    assert not (tmp_path / "out" / FOLDER).exists()


def test_two_processes_go_on_from_what_one_has_left(checkpoint, source, cpu, tmp_path, monkeypatch, kill):
    """Of 110 blocks the first process takes the first 102, one micro-batch, as the run alone did."""
    monkeypatch.undo()
    monkeypatch.setattr(module, "SECONDS", 0.0)
    settings = {"seq_lens": [40], "num_blocks": 110}
    evaluated(checkpoint, source, cpu, tmp_path / "whole", **settings)
    add = Journal.add

    def killed(self, done, observers):
        add(self, done, observers)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", killed)
        with pytest.raises(Killed):
            evaluated(checkpoint, source, cpu, tmp_path / "out", **settings)
    assert [path.name for path in (tmp_path / "out" / FOLDER).rglob("*.safetensors")] == ["0-102.safetensors"]
    evaluated(checkpoint, source, replace(cpu, processes=2), tmp_path / "out", **settings)
    assert written(tmp_path / "out") == written(tmp_path / "whole")


class Notes:
    """An observer of a hundred blocks, three values each."""

    def __init__(self):
        self.values = torch.zeros(100, 3)

    def noted(self, first, end):
        return {"values": self.values[first:end]}


def test_a_long_pass_leaves_few_files_as_large_as_what_it_noted(tmp_path):
    notes, journal = Notes(), Journal(tmp_path, {"pass": 1})
    for block in range(100):
        notes.values[block] = block
        journal.add(Part(block, block + 1), [notes])
        files = list(journal.folder.iterdir())
        assert len(files) <= 7 and sum(path.stat().st_size for path in files) <= len(files) * 1024 + 12 * (block + 1)
    again, found = Notes(), Journal(tmp_path, {"pass": 1})
    assert sum(part.size for part in found.restore(Part(0, 100), [again])) == 100
    assert torch.equal(again.values, notes.values)


def test_parts_beyond_ones_own_blocks_are_left_alone(tmp_path):
    notes, journal = Notes(), Journal(tmp_path, {"pass": 1})
    notes.values[:] = 1
    for part in (Part(0, 10), Part(50, 60), Part(58, 70)):
        journal.add(part, [notes])
    found = Notes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Journal(tmp_path, {"pass": 1}).restore(Part(40, 65), [found]) == [(50, 60)]
    assert found.values.any(1).nonzero().flatten().tolist() == list(range(50, 60))
    assert len(list(journal.folder.iterdir())) == 3


def test_a_part_inside_another_is_what_a_killed_writer_left(tmp_path):
    """It had written the longer one and not yet removed the shorter ones."""
    notes, journal = Notes(), Journal(tmp_path, {"pass": 1})
    notes.values[:] = 1
    journal.add(Part(0, 4), [notes])
    saved = tmp_path / "0-4"
    shutil.copyfile(journal.folder / "0-4.safetensors", saved)
    journal.add(Part(4, 8), [notes])
    shutil.copyfile(saved, journal.folder / "0-4.safetensors")
    assert Journal(tmp_path, {"pass": 1}).restore(Part(0, 100), [Notes()]) == [(0, 8)]


def test_a_pass_restored_whole_computes_nothing(checkpoint, source, cpu, tmp_path, kill, monkeypatch):
    evaluated(checkpoint, source, cpu, tmp_path / "whole", seq_lens=[40])
    monkeypatch.setattr(Journal, "remove", lambda self: None)
    evaluated(checkpoint, source, cpu, tmp_path / "out", seq_lens=[40])
    for path in (tmp_path / "out").glob("*.*"):
        path.unlink()
    count = kill(None)
    evaluated(checkpoint, source, cpu, tmp_path / "out", seq_lens=[40])
    assert count["done"] == 0 and written(tmp_path / "out") == written(tmp_path / "whole")
    content = json.loads((tmp_path / "out" / "base.json").read_text())
    assert content["packs"][0]["seq"]["40"]["model"]["tok_s_pred"] == 0
    assert np.isfinite(content["packs"][0]["seq"]["40"]["model"]["ppl"])
