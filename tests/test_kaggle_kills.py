"""kill -9 the driver at each step and repeat the command: one kernel, one session, one result."""

import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from kaggle_server import assert_loopback, session_environment
from test_kaggle_faults import files_of, impatient, push, submit

from eaftlib import notebooks
from eaftlib.kaggle import build, finishing, ledger, pulling
from eaftlib.kaggle.service import Service

# Children of a server process that has imported everything once: each begins as a clean copy, without threads.
forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(
    ["eaftlib.kaggle.finishing", "eaftlib.kaggle.pulling", "eaftlib.kaggle.pushing", "kagglesdk.kaggle_client"]
)
FILE_EVENTS = ("os.rename", "os.mkdir", "shutil.rmtree", "os.remove")


def drive(folder, environment, wheel, command, names, fatal, counted):
    """In a child: one command of the driver; it kills itself before file-system change number ``fatal``."""
    os.chdir(folder)
    os.environ.update(environment)
    sys.stdout = open(os.devnull, "w")
    build.make_wheel, build._require_all_code = lambda folder: wheel, lambda *_: None
    notebooks.stale = lambda: []
    root = str(Path("kaggle_runs").resolve())

    def audit(event, arguments):
        if event in FILE_EVENTS and os.path.abspath(str(arguments[0])).startswith(root):
            counted.value += 1
            if counted.value == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    service = Service(first_wait=0.01, longest_wait=0.02)
    if command == "push":
        submit([Path(f"params/tiny/{name}.yaml") for name in names], service)
    elif command == "follow":
        finishing.follow(service, poll_seconds=0.02)
    else:
        pulling.pull(service)


@pytest.fixture
def child(here, server, wheel, tmp_path):
    """Start a command in a process of its own."""
    environment = session_environment(tmp_path) | server.environment(tmp_path)
    assert_loopback(environment)
    files_of(here, "eval")

    def start(command, fatal=None, names=("eval",)):
        counted = forkserver.Value("i", 0, lock=False)
        process = forkserver.Process(target=drive, args=(here, environment, wheel, command, names, fatal, counted))
        process.start()
        process.counted = counted
        return process

    return start


def finish(process):
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def repeat(command, here, server):
    """What a person does after a crash, here in this process; then the session's end is waited for."""
    if command == "push":
        push(here, "eval", say=lambda line: None)
        server.wait(ledger.entries()[0].run)
    else:
        pulling.pull(impatient(), say=lambda line: None)


def assert_one_of_each(server):
    ((run, versions),) = server.kernels.items()
    assert len(versions) == 1 and len(server.datasets) == 1 and server.calls.count("SaveKernel") == 1
    (entry,) = ledger.entries()
    assert entry.run == run and entry.state == "verified" and entry.version == 1
    assert {p.name for p in entry.result_folder.iterdir()} >= set(entry.results)


def forget(server, here):
    """As if nothing had ever been pushed."""
    server.kernels.clear(), server.datasets.clear(), server.calls.clear()
    shutil.rmtree(here / "kaggle_runs", ignore_errors=True)
    shutil.rmtree(server.folder, ignore_errors=True)


def test_killed_before_each_change_of_a_file(here, server, child):
    process = child("push")
    assert finish(process) == 0
    server.wait(ledger.entries()[0].run)
    shutil.copytree(here / "kaggle_runs", here / "pushed")
    changes = {"push": process.counted.value}
    process = child("pull")
    assert finish(process) == 0
    assert_one_of_each(server)
    changes["pull"] = process.counted.value
    assert changes["push"] >= 6 and changes["pull"] >= 5, changes
    for fatal in range(1, changes["pull"] + 1):
        shutil.rmtree(here / "kaggle_runs")
        shutil.copytree(here / "pushed", here / "kaggle_runs")
        assert finish(child("pull", fatal)) == -signal.SIGKILL
        repeat("pull", here, server)
        assert_one_of_each(server)
    for fatal in range(1, changes["push"] + 1):
        forget(server, here)
        assert finish(child("push", fatal)) == -signal.SIGKILL
        repeat("push", here, server)
        repeat("pull", here, server)
        assert_one_of_each(server)
    print(f"killed before each of {changes}")


CALLS = [
    ("push", "GetKernel"), ("push", "GetDatasetStatus"), ("push", "StartBlobUpload"), ("push", "CreateDataset"),
    ("push", "ListDatasetFiles"), ("push", "SaveKernel"), ("pull", "GetKernelSessionStatus"),
    ("pull", "ListKernelSessionOutput"),
]  # fmt: skip


@pytest.mark.parametrize("phase", ["before", "after"])
@pytest.mark.parametrize("command, method", CALLS)
def test_killed_around_each_call(here, server, child, command, method, phase):
    """Before the service has seen the call, and after it has acted on it but before its answer is read."""
    victim = []

    def kill(called, when):
        if (called, when) == (method, phase) and victim:
            os.kill(victim.pop().pid, signal.SIGKILL)

    server.on_call = kill
    if command == "pull":
        repeat("push", here, server)
    process = child(command)
    victim.append(process)
    assert finish(process) == -signal.SIGKILL
    for name in ("push", "pull"):
        repeat(name, here, server)
    assert_one_of_each(server)


@pytest.mark.parametrize("pushes", [1, 2, 3, 4])
def test_a_batch_that_is_killed_goes_on(here, server, child, pushes):
    """Killed right after its n-th push, before the answer is read; another terminal's rerun pushes the rest."""
    victim, pushed = [], []

    def kill(called, when):
        if (called, when) == ("SaveKernel", "after"):
            pushed.append(called)
            if len(pushed) == pushes:
                os.kill(victim.pop().pid, signal.SIGKILL)

    server.on_call = kill
    names = [f"eval-{i}" for i in range(4)]
    files_of(here, *names)
    process = child("push", names=names)
    victim.append(process)
    assert finish(process) == -signal.SIGKILL
    assert len(server.kernels) == pushes
    push(here, *names, say=lambda line: None)
    for run in server.kernels:
        server.wait(run)
    assert [e.state for e in pulling.pull(impatient(), say=lambda line: None)] == ["verified"] * 4
    assert len(server.kernels) == 4 and all(len(versions) == 1 for versions in server.kernels.values())
    assert server.most_sessions <= 2 and server.calls.count("SaveKernel") == 4
