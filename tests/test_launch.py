"""A call that is shared by processes gives what it gives alone, and ends with a reason when one of them fails."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eaftlib.engine import launch, ranks, traversal
from eaftlib.engine import placement as devices
from eaftlib.engine.launch import over_gpus
from eaftlib.errors import PackError, ScoringError
from eaftlib.evaluation import evaluate as evaluation
from eaftlib.evaluation import results
from eaftlib.model.checkpoint import Checkpoint
from eaftlib.pruning.trace import record
from eaftlib.recovery import recover as recovery
from eaftlib.text.packs import PackSource, pack_blocks

TWO = replace(devices.place("cpu", "float32"), processes=2)


def note(folder, text):
    (Path(folder) / f"{text}-{ranks.current()[0]}").write_text(str(os.getpid()))


@over_gpus(lambda **_: 9)
def shares(folder, *, placement):
    """What each rank knows."""
    note(folder, "seen")
    total = torch.tensor([10.0 ** ranks.current()[0]])
    ranks.add_up([total])
    names = ranks.gather(f"gpu {ranks.current()[0]}")
    return ranks.current(), ranks.on_this_host(), placement, total.item(), names


@over_gpus(lambda **_: 9)
def fails(folder, how, placement):
    """On rank 1; rank 0 waits for it, computing or in a sum."""
    note(folder, "there")
    if ranks.current()[0] == 1:
        if "killed" in how:
            os.kill(os.getpid(), signal.SIGKILL)
        raise ScoringError("block 3, position 7: nll nan")
    if "sum" in how:
        ranks.largest(0.0)
    for _ in range(60000):
        time.sleep(0.01)


@over_gpus(lambda **_: 9)
def fails_last(folder, how, placement):
    """Of three, the last one, while the second still computes and the first waits."""
    if ranks.current()[0] == 2:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ScoringError("block 3, position 7: nll nan")
    if ranks.current()[0] == 1 and how != "raises in a sum":
        time.sleep(600)
    ranks.largest(0.0)


@over_gpus(lambda **_: 9)
def fails_everywhere(placement):
    raise PackError("pack z is not there")


@over_gpus(lambda **_: 9)
def fails_here(folder, placement):
    note(folder, "there")
    ranks.largest(0.0)
    if ranks.current()[0] == 0:
        raise PackError("only here")
    time.sleep(600)


@over_gpus(lambda **_: 9)
def sleeps(folder, placement):
    note(folder, "there")
    time.sleep(600)


@over_gpus(lambda **_: 9)
def warns(placement):
    if ranks.current()[0]:
        print("1 ran out of memory")


def is_gone(pid):
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    return False


def test_each_rank_gets_the_call_and_its_own_placement(tmp_path):
    before = dict(os.environ)
    for processes in (2, 3):  # what the first call leaves behind must not disturb the second
        rank, local, placement, total, names = shares(tmp_path, placement=replace(TWO, processes=processes))
        assert rank == (0, processes) and local == processes and total == float("1" * processes)
        assert placement == replace(TWO, processes=1) and names == [f"gpu {r}" for r in range(processes)]
        pids = {file.name: file.read_text() for file in tmp_path.iterdir()}
        assert sorted(pids) == [f"seen-{r}" for r in range(processes)] and len(set(pids.values())) == processes
        assert pids.pop("seen-0") == str(os.getpid()) and all(map(is_gone, pids.values()))
        assert dict(os.environ) == before and not torch.distributed.is_initialized()


@over_gpus(lambda shared, placement: shared)
def divided(shared, placement):
    return ranks.current(), placement


@pytest.mark.parametrize("shared, started", [(0, 1), (1, 1), (2, 2), (5, 3)])
def test_no_more_processes_are_started_than_have_work(monkeypatch, shared, started):
    counts = [1]  # where no other is started
    monkeypatch.setattr(launch, "_helpers", lambda count, call: (counts.append(count), nullcontext())[1])
    monkeypatch.setattr(launch.pickle, "dumps", lambda call: monkeypatch.setenv(launch.SHARED, "1"))
    (_, size), placement = divided(shared, replace(TWO, processes=3))
    assert counts[-1] == started and size == 1 and placement.processes == 1


def test_the_work_of_a_call_is_counted_in_micro_batches(monkeypatch, checkpoint):
    monkeypatch.setitem(traversal.MICRO_BATCH_TOKENS, "cpu", 80)
    monkeypatch.setitem(traversal.TRAINING_VALUES, "cpu", 80 * checkpoint.config.hidden_size)
    count = evaluation._shares(TWO, [24, 40, 100], {"24": 3, "40": 5, "100": 2})
    assert count == 3 == evaluation._shares(TWO, [40], 5)  # 1 of 3 blocks, 3 of at most 2 blocks, 2 of 1 block
    blocks, step = SimpleNamespace(seq_len=40), SimpleNamespace(batch_blocks=4)
    assert recovery._shares(checkpoint, blocks, TWO, held_out_blocks=3, schedule=step) == 2
    assert recovery._shares(checkpoint, blocks, TWO, held_out_blocks=9, schedule=step) == 5


def test_one_process_starts_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(launch.subprocess, "Popen", None)
    assert shares(tmp_path, placement=replace(TWO, processes=1))[0] == (0, 1)


HERE, IN_BACKGROUND = signal.default_int_handler, signal.SIG_IGN
NAN = "GPU 1 ended with status 1: eaftlib.errors.ScoringError: block 3, position 7: nll nan"


@pytest.mark.parametrize(
    "how, words, interrupts",
    [
        ("raises in a sum", NAN, HERE),
        ("raises", NAN, HERE),
        ("killed in a sum", "GPU 1 ended with status -9: it said nothing", HERE),
        ("killed", "GPU 1 ended with status -9: it said nothing", HERE),
        ("raises", NAN, IN_BACKGROUND),
    ],
    ids=["raises in a sum", "raises", "killed in a sum", "killed", "raises, in the background"],
)
def test_a_rank_that_fails_ends_the_call_with_its_reason(tmp_path, monkeypatch, request, how, words, interrupts):
    """Also as a job that a script has put into the background: there an interrupt from the keyboard is ignored."""
    monkeypatch.setattr(launch, "GRACE_SECONDS", 1)
    request.addfinalizer(partial(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, interrupts)))
    started = time.monotonic()
    with pytest.raises(ScoringError, match=words):
        fails(tmp_path, how, TWO)
    assert time.monotonic() - started < 200  # not when rank 0 has done its ten minutes of work


@pytest.mark.parametrize(
    "how, words",
    [
        ("raises", "GPU 2 ended with status 1: eaftlib.errors.ScoringError: block 3, position 7: nll nan"),
        ("raises in a sum", "GPU 2 ended with status 1: eaftlib.errors.ScoringError: block 3, position 7: nll nan"),
        ("killed", "GPU 2 ended with status -9: it said nothing"),
    ],
)
def test_of_several_the_one_that_failed_first_is_named_and_soon(tmp_path, monkeypatch, how, words):
    monkeypatch.setattr(launch, "GRACE_SECONDS", 1)
    started = time.monotonic()
    with pytest.raises(ScoringError, match=words):
        fails_last(tmp_path, how, replace(TWO, processes=3))
    assert time.monotonic() - started < 200  # not when the others have done their ten minutes of work


def test_what_is_wrong_with_the_call_is_said_as_one_process_says_it():
    with pytest.raises(PackError, match=r"^pack z is not there$"):
        fails_everywhere(TWO)


def test_no_process_outlives_the_call(tmp_path):
    with pytest.raises(PackError, match="only here"):
        fails_here(tmp_path, TWO)
    assert is_gone((tmp_path / "there-1").read_text())
    assert not torch.distributed.is_initialized() and "RANK" not in os.environ


def test_no_process_outlives_the_one_that_started_it(tmp_path):
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_launch as t; "
    program += f"t.sleeps({str(tmp_path)!r}, placement=t.TWO)"
    started = subprocess.Popen([sys.executable, "-c", program])
    while not (tmp_path / "there-1").exists():
        assert started.poll() is None
        time.sleep(0.1)
    started.kill()
    started.wait()
    helper = (tmp_path / "there-1").read_text()
    for _ in range(100):
        if is_gone(helper):
            return
        time.sleep(0.1)
    raise AssertionError(f"{helper} goes on alone")


def test_what_other_ranks_say_is_shown(capsys):
    warns(TWO)
    assert capsys.readouterr().err == "GPU 1: 1 ran out of memory\n"


def without_timings(result):
    content = json.loads(json.dumps(result.content))
    content["meta"].pop("tokens_sha256", None)
    for pack in content["packs"]:
        for entry in pack["seq"].values():
            assert entry["model"].pop("tok_s_pred") > 0
    return content


def same_evaluation(checkpoint, source, folder, alone, shared, **settings):
    written = [
        evaluation.evaluate(
            checkpoint, source, placement, {"base": None}, out_dir=folder / name, progress=False, **settings
        )
        for name, placement in (("alone", alone), ("shared", shared))
    ]
    alone, shared = (results.read(paths[0]) for paths in written)
    assert without_timings(alone) == without_timings(shared)
    for key in alone.entries:
        np.testing.assert_array_equal(alone.tokens(*key).nll, shared.tokens(*key).nll)


def test_an_evaluation_is_the_same_shared(checkpoint, source, cpu, tmp_path):
    """More blocks than one micro-batch holds, so that both processes have some."""
    assert 110 * 40 > traversal.MICRO_BATCH_TOKENS["cpu"]
    same_evaluation(checkpoint, source, tmp_path, cpu, TWO, seq_lens=[24, 40], num_blocks=110, only=["UNION"])


def test_a_ranking_is_the_same_shared(checkpoint, source, cpu):
    blocks = pack_blocks(
        source, "UNION", checkpoint.tokenizer, checkpoint.family.completion_spans, seq_len=40, num_blocks=110
    )
    alone, shared = (record(checkpoint, blocks, place, progress=False)[0] for place in (cpu, TWO))
    for name in ("nll", "entropy", "expert", "gate", "norm", "peak"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(shared, name))
    assert alone.provenance == shared.provenance


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_all_gpus_give_what_one_gives(tmp_path, dtype):
    demo = Path(__file__).parents[1] / "demo"
    checkpoint, source = Checkpoint(str(demo / "model")), PackSource(str(demo / "packs"))
    one, all_of_them = devices.place("cuda", dtype), devices.place("auto", dtype)
    same_evaluation(checkpoint, source, tmp_path, one, all_of_them, seq_lens=[1024], num_blocks=64, only=["UNION"])
