"""Runs that are longer than a session: what goes along, when it goes on, when it stops, whoever is killed in between."""

import functools
import json
import os
import shutil
import signal
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import test_kaggle_kills
import yaml
from kaggle_server import TINY, log_of, run_of
from safetensors.numpy import load_file, save_file
from test_kaggle_faults import LIMITS, files_of, impatient, push, submit
from test_kaggle_job import ASKED

from eaftlib import project
from eaftlib.__main__ import main
from eaftlib.engine import journal, traversal
from eaftlib.errors import KaggleError
from eaftlib.evaluation import results
from eaftlib.evaluation.evaluate import evaluate
from eaftlib.kaggle import finishing, following, ledger, pulling, service, sessions
from eaftlib.kaggle.job import JOBS
from eaftlib.kaggle.service import LimitReached, QuotaReached
from eaftlib.model.checkpoint import Checkpoint
from eaftlib.recovery import recover
from eaftlib.text.packs import PackSource

child = test_kaggle_kills.child  # a fixture


@pytest.fixture(autouse=True)
def _no_session_is_denied_for_long(monkeypatch):
    """What the service shows is at once the present attempt."""
    monkeypatch.setattr(pulling, "GRACE", timedelta(0))


@pytest.fixture
def plays(server, play):
    """plays(*kinds): what becomes of one session after the other; the last kind is also what becomes of those after it.

    A number: at its deadline, with so many bytes in its journal; "lost": without a trace; "killed": no word of its end.
    """

    def session(version, kinds):
        kind = kinds[min(version.number, len(kinds)) - 1]
        if kind == "lost":
            return "ERROR"
        if kind == "complete":
            return play(version)
        words = {"cancelled": "running", "killed": "running", "failed": "failed"}.get(kind, "deadline")

        def change(folder, content):
            for file in folder.iterdir():
                file.unlink()
            content.update(status=words, error="Traceback\nTimeoutError: it is over")

        play(version, change=change)
        if isinstance(kind, int):
            part = version.working / "journal" / "ab" / "0-3.safetensors"
            part.parent.mkdir(parents=True)
            part.write_bytes(b"x" * kind)
        return "CANCEL_ACKNOWLEDGED" if kind == "cancelled" else "ERROR"

    def start(*kinds):
        server.session = lambda version: session(version, kinds)

    return start


def follow(runs=(), **options):
    return finishing.follow(impatient(), runs, poll_seconds=0.02, **({"say": lambda line: None} | options))


def given(version):
    """What a session was given of the ones before: name -> bytes."""
    files = {name: file for name, file in run_of(version)["files"].items() if file["resume"]}
    mounted = {f.name: f for f in (version.folder / "input").rglob("*") if f.is_file()}
    return {name: mounted[file["stored_as"]].read_bytes() for name, file in files.items()}


def test_a_run_goes_on_over_three_sessions_as_one_entry_with_one_result(here, server, plays):
    plays(10, 20, "complete")
    said = []
    push(here, "eval")
    (entry,) = follow(say=said.append)
    assert entry.state == "verified" and entry.attempt == 3 and len(ledger.entries()) == 1
    states = [step.state for step in entry.steps]
    assert states.count("unfinished") == 2 and states.count("pushing") == 3 and states[-1] == "verified"
    first, second, third = server.kernels[entry.run]
    part = "journal/ab/0-3.safetensors"
    assert [given(v) for v in (first, second, third)] == [{}, {part: b"x" * 10}, {part: b"x" * 20}]
    assert [run_of(v)["attempt"] for v in (first, second, third)] == [1, 2, 3]
    assert [(s.attempt, s.journal_bytes, s.progress, s.next_from) for s in entry.sessions] == [
        (1, 10, True, 1),
        (2, 20, True, 2),
    ]
    assert sum("unfinished" in line for line in said) == 2 and any("session 2 left 0 passes" in line for line in said)
    assert server.calls.count("SaveKernel") == 3 and follow([entry.run]) == [entry]
    assert len(server.datasets) == 3  # the model and packs once, and what each of two sessions left
    about = [json.loads(v.request["text"])["cells"][0]["source"] for v in (first, third)]
    assert "| attempt | 1 |" in "".join(about[0]) and "| attempt | 3 |" in "".join(about[1])


def test_the_next_session_has_the_first_ones_code_whatever_becomes_of_the_working_tree(
    here, server, plays, monkeypatch
):
    plays(10, "complete")
    (entry,) = push(here, "eval")
    server.wait(entry.run)
    monkeypatch.setattr(project, "code_sha256", lambda package=None: "other")
    (here / entry.params_file).write_text("model: other\n")
    assert follow()[0].state == "verified"
    texts = [version.request["text"] for version in server.kernels[entry.run]]
    wheels = [
        next(c for c in json.loads(t)["cells"] if "".join(c["source"]).startswith("# eaftlib itself")) for t in texts
    ]
    assert wheels[0] == wheels[1] and run_of(server.latest(entry.run))["code_sha256"] == entry.code_sha256


def test_the_next_session_gets_the_present_settings(here, server, plays):
    plays(10, "complete")
    push(here, "eval")
    settings = here / "params" / "kaggle.yaml"
    settings.write_text(settings.read_text().replace("session_hours: 11.5", "session_hours: 3"))
    (entry,) = follow()
    version = server.latest(entry.run)
    assert (
        version.request["sessionTimeoutSeconds"] == 3 * 3600 and run_of(version)["deadline_seconds"] == 3 * 3600 - 600
    )


@pytest.mark.parametrize("trouble", ["lost", "killed"])
def test_after_a_session_without_progress_the_state_before_is_pushed_again(here, server, plays, trouble):
    plays(10, trouble, 30, "complete")
    push(here, "eval")
    (entry,) = follow()
    assert entry.state == "verified" and [s.progress for s in entry.sessions] == [True, False, True]
    _, second, third, fourth = map(given, server.kernels[entry.run])
    assert second == third == {"journal/ab/0-3.safetensors": b"x" * 10} and [*fourth.values()] == [b"x" * 30]


@pytest.mark.parametrize(
    "kinds, words",
    [
        ([10, 20, "lost", "lost"], "no progress in two sessions in a row, 3 and 4"),
        ([10, 10, "killed", 30], "no progress in two sessions in a row, 2 and 3"),
        (["lost", "lost", "complete"], "no progress in two sessions in a row, 1 and 2"),
        ([0, 10, 10, 5], "no progress in two sessions in a row, 3 and 4"),
        ([10, "failed", "complete"], "TimeoutError: it is over"),
        ([10, "cancelled", "complete"], "CANCEL_ACKNOWLEDGED"),
    ],
)
def test_where_another_session_would_not_help_it_stops_and_says_so(here, server, plays, kinds, words):
    plays(*kinds)
    said = []
    push(here, "eval")
    (entry,) = follow(say=said.append)
    assert entry.state == "failed" and words in entry.steps[-1].note, entry.steps[-1].note
    assert any(words in line for line in said)
    pushed = len(kinds) - (kinds[-1] in ("complete", 30))
    assert len(server.kernels[entry.run]) == pushed == len(entry.sessions)
    server.session = lambda version: "ERROR"
    assert push(here, "eval")[0].state == "failed" and follow() == []  # not by itself
    entry = push(here, "eval", resume=True)[0]
    carried = max((s for s in entry.sessions), key=lambda s: s.journal_bytes)
    if carried.journal_bytes:
        assert entry.sessions[-1].next_from and "resumes with journal (1 files" in entry.steps[-3].note


def test_less_than_before_is_gone_on_from_only_where_the_session_meant_it(here, server, plays):
    """Another image: what was there is of no use. At its deadline it has begun anew, and that is what can go on."""
    plays(20, 10, 15, "complete")
    push(here, "eval")
    (entry,) = follow()
    assert entry.state == "verified" and [s.progress for s in entry.sessions] == [True, False, True]
    assert [[len(c) for c in given(v).values()] for v in server.kernels[entry.run]] == [[], [20], [10], [15]]


def test_what_is_too_large_does_not_go_along_and_the_run_stops(here, server, plays, monkeypatch):
    monkeypatch.setattr(sessions, "CARRY_LIMIT", 15)
    plays(10, 20, "complete")
    push(here, "eval")
    (entry,) = follow()
    assert entry.state == "failed" and "what it left has 0.0 MB; at most 0.0 MB go along" in entry.steps[-1].note
    assert len(server.kernels[entry.run]) == 2


@pytest.mark.parametrize("text", LIMITS)
def test_a_limit_in_between_is_waited_for_or_stops(here, server, plays, monkeypatch, text):
    waits, sleep = [], finishing.time.sleep
    monkeypatch.setattr(finishing.time, "sleep", lambda seconds: (waits.append(seconds), sleep(min(seconds, 0.05))))
    plays(10, "complete")
    (entry,) = push(here, "eval")
    server.wait(entry.run)
    server.refusals.extend([text] * 3)
    with pytest.raises(LimitReached, match=r"1 run\(s\) wait: repeat the command later"):
        follow(at_limit="stop")
    assert ledger.find(entry.run).state == "queued" and ledger.find(entry.run).attempt == 2
    said = []
    (entry,) = follow(say=said.append)
    assert entry.state == "verified" and len(server.kernels[entry.run]) == 2
    assert sum(f"waiting: {text}" in line for line in said) == 1  # one line for one reason
    assert waits.count(0.2) == (2 if "quota" in text else 0)


def test_it_follows_several_runs_and_one_that_cannot_be_asked_about_holds_up_none(here, server, plays):
    plays(10, "complete")
    server.session_limit = 2
    first, second = push(here, "eval-a", "eval-b")
    server.wait(first.run), server.wait(second.run)
    server.inject("GetKernelSessionStatus", *[500] * 8)
    said = []
    entries = follow(say=said.append)
    assert [e.state for e in entries] == ["verified"] * 2 and [len(v) for v in server.kernels.values()] == [2, 2]
    assert any("status: 500" in line for line in said)


def test_an_unfinished_run_goes_on_when_it_is_pushed_again_and_is_left_alone_by_pull(here, server, plays):
    plays(10, "complete")
    run = push(here, "eval")[0].run
    server.wait(run)
    assert pulling.pull(impatient())[0].state == "unfinished"
    assert pulling.pull(impatient()) == [] and "unfinished" in following.describe(ledger.find(run))
    assert pulling.pull(impatient(), [run])[0].state == "unfinished"  # looked at again
    assert len(ledger.find(run).sessions) == 1
    assert push(here, "eval")[0].state == "submitted" and server.wait(run).number == 2
    assert pulling.pull(impatient())[0].state == "verified"


@pytest.mark.parametrize("until, states", [(None, {"verified"}), ("submitted", {"submitted", "running", "ended"})])
def test_a_push_stays_until_its_runs_are_verified_or_only_submitted(here, server, plays, monkeypatch, until, states):
    """A batch of an evening, by the command: one session at a time, each run over two."""
    plays(10, "complete")
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.02)))
    monkeypatch.setattr(service, "Service", impatient)
    settings = here / "params" / "kaggle.yaml"
    settings.write_text(settings.read_text().replace("gpu_sessions: 2", "gpu_sessions: 1"))
    files = map(str, files_of(here, "eval-a", "eval-b"))
    assert main(["kaggle", "push", *files, *(["--until", until] if until else [])]) == 0
    entries = ledger.entries()
    assert len(entries) == 2 and entries[-1].state in states and server.most_sessions == 1
    assert {entry.attempt for entry in entries} == ({1} if until else {2})


def test_nothing_to_follow_ends_at_once(here, server):
    assert follow() == []
    with pytest.raises(KaggleError, match="no run 'eaft-x'"):
        follow(["eaft-x"])


def test_of_a_killed_session_only_more_than_before_is_taken(here, server, plays, play):
    """It was killed while it put in place what it had been given."""
    plays(20, "killed", "complete")
    inner = server.session

    def session(version):
        status = inner(version)
        if version.number == 2:
            (version.working / "journal").mkdir()
            (version.working / "journal" / "half").write_bytes(b"x" * 10)
        return status

    server.session = session
    push(here, "eval")
    (entry,) = follow()
    assert entry.state == "verified" and [*given(server.latest(entry.run)).values()] == [b"x" * 20]


def test_the_driver_is_killed_before_any_change_of_a_file_and_started_again(here, server, plays, child, monkeypatch):
    """Each session is pushed once, and the end is the same."""
    plays(10, 20, "complete")
    push(here, "eval", say=lambda line: None)
    shutil.copytree(here / "kaggle_runs", here / "pushed")
    (run,) = server.kernels
    server.wait(run)
    first, kept = server.kernels[run][0], dict(server.datasets)

    def start_again():
        server.kernels[run][1:] = []
        server.datasets.clear(), server.datasets.update(kept), server.calls.clear()
        for folder in server.folder.glob(f"{run}-v[2-9]"):
            shutil.rmtree(folder)
        shutil.rmtree(here / "kaggle_runs")
        shutil.copytree(here / "pushed", here / "kaggle_runs")

    process = child("follow")
    assert test_kaggle_kills.finish(process) == 0 and ledger.find(run).state == "verified"
    changes = process.counted.value
    assert changes >= 25 and server.kernels[run][0] is first
    for fatal in range(1, changes + 1, 7):
        start_again()
        assert test_kaggle_kills.finish(child("follow", fatal)) == -signal.SIGKILL
        (entry,) = follow([run])
        assert entry.state == "verified" and entry.attempt == 3 and len(server.kernels[run]) == 3, fatal
        assert server.calls.count("SaveKernel") == 2
        assert [s.journal_bytes for s in entry.sessions] == [10, 20]


@pytest.mark.parametrize("method", ["ListKernelSessionOutput", "CreateDataset", "SaveKernel"])
@pytest.mark.parametrize("phase", ["before", "after"])
def test_the_driver_is_killed_around_a_call_and_started_again(here, server, plays, child, method, phase):
    plays(10, "complete")
    (entry,) = push(here, "eval", say=lambda line: None)
    server.wait(entry.run)
    victim = []

    def kill(called, when):
        if (called, when) == (method, phase) and victim:
            os.kill(victim.pop().pid, signal.SIGKILL)

    server.on_call = kill
    victim.append(child("follow"))
    assert test_kaggle_kills.finish(victim[0]) == -signal.SIGKILL
    (entry,) = follow()
    assert entry.state == "verified" and len(server.kernels[entry.run]) == 2 and server.calls.count("SaveKernel") == 2


# --- what each notebook's sessions leave ------------------------------------------------------------------------------


def test_names_that_are_written_here_too_are_the_librarys():
    from eaftlib.kaggle import job

    assert (sessions.JOURNAL, job._STATE) == (journal.FOLDER, recover.STATE)


def test_the_state_of_a_training_goes_along_and_counts_its_steps(tmp_path, monkeypatch):
    curve = [{"step": 0}, {"step": 61}, {"step": 122}]
    save_file({"leaves/x": np.ones(9, np.float32)}, tmp_path / "state.safetensors", {"curve": json.dumps(curve)})
    (tmp_path / "recovery.json").write_text("{}")
    left = sessions.look(tmp_path, "05_recover")
    assert [f.name for f in left.files] == ["state.safetensors"] and left.finished == 122
    monkeypatch.setattr(sessions, "CARRY_LIMIT", 10)
    left = sessions.look(tmp_path, "05_recover")
    assert left.files == [] and left.finished == 0 and left.too_large == (tmp_path / "state.safetensors").stat().st_size
    (tmp_path / "state.safetensors").write_bytes(b"cut short")
    assert sessions.look(tmp_path, "05_recover").finished == 0
    assert JOBS["05_recover"].unit == "steps" and ASKED["check_every"]


def test_of_what_is_too_large_together_whole_results_go_first(scored, tmp_path, monkeypatch):
    shutil.copytree(scored, tmp_path / "left")
    (tmp_path / "left" / "journal").mkdir()
    (tmp_path / "left" / "journal" / "part").write_bytes(b"x" * 1000)
    (tmp_path / "left" / "journal" / ".part.half").write_bytes(b"x")
    left = sessions.look(tmp_path / "left", "03_evaluate")
    assert [f.name for f in left.files] == ["base.json", "base.tokens.parquet", "part"]
    assert (left.finished, left.journal_bytes, left.too_large) == (4, 1000, 0)
    monkeypatch.setattr(sessions, "CARRY_LIMIT", sum(f.stat().st_size for f in left.files) - 1)
    left = sessions.look(tmp_path / "left", "03_evaluate")
    assert [f.name for f in left.files] == ["base.json", "base.tokens.parquet"] and left.too_large == 1000


# --- executed: the set-up cell, the journal, the library ---------------------------------------------------------------

# A wave and a part of the journal for each block; the deadline comes right after part number PARTS of the session.
TRAP = """
from eaftlib.engine import journal, traversal
journal.SECONDS = 0.0
traversal.MICRO_BATCH_TOKENS['cpu'] = 40
def counted(self, observers, flush=journal.Journal.flush, left=[PARTS]):
    flush(self, observers)
    left[0] -= 1
    if left[0] == 0:
        signal.raise_signal(signal.SIGALRM)
journal.Journal.flush = counted"""


@pytest.fixture
def executed(server, forks):
    """executed(parts, lost): sessions that are executed, and end as ``executed_with_deadline`` says."""
    server.forks = forks
    return functools.partial(executed_with_deadline, server)


def executed_with_deadline(server, parts, lost=()):
    """Sessions that end at their deadline after so many parts; those numbered ``lost`` leave nothing."""

    def session(version):
        if version.number in lost:
            return "ERROR"
        text = version.request["text"]
        assert text.count("session.start(WHEEL)") == 1
        trap = json.dumps("session.start(WHEEL)" + TRAP.replace("PARTS", str(parts)))[1:-1]
        version.request["text"] = text.replace("session.start(WHEEL)", trap)
        return server.execute_in_fork(version)

    server.session = session


def entries_of(path):
    """Every number of a result but its speed."""
    found = results.read(path).entries
    for entry in found.values():
        del entry["model"]["tok_s_pred"]
    return found


def test_an_evaluation_over_sessions_has_the_bytes_of_an_undisturbed_one(here, server, executed, cpu, monkeypatch):
    """Three that compute, one that is lost, the quota used up in between, the driver stopped and started again."""
    executed(parts=5, lost=[2])
    (entry,) = submit(files_of(here, "eval"), impatient(call_seconds=20))
    server.wait(entry.run)
    server.refusals.append(LIMITS[1])
    with pytest.raises(QuotaReached):
        follow(at_limit="stop")
    monkeypatch.setattr(finishing.pushing, "QUOTA_POLLS", 1)
    (entry,) = follow()
    assert entry.state == "verified", entry.steps[-1].note + log_of(server.latest(entry.run))
    assert [s.progress for s in entry.sessions] == [True, False, True] and entry.attempt == 4
    assert [s.finished for s in entry.sessions] == [1, 0, 3] and entry.sessions[0].journal_bytes > 0
    assert len(server.kernels[entry.run]) == 4 and not (server.latest(entry.run).working / "journal").exists()
    assert "finished by an earlier run of the same, not repeated: UNION 24\n" in log_of(server.kernels[entry.run][2])

    monkeypatch.setitem(traversal.MICRO_BATCH_TOKENS, "cpu", 40)
    settings = {name: TINY[name] for name in ("seq_lens", "num_blocks", "only")} | {"progress": False}
    one, other = entry.result_folder, here / "whole"
    evaluate(Checkpoint("tiny/model"), PackSource("tiny/packs"), cpu, {"base": None}, out_dir=other, **settings)
    assert (one / "base.tokens.parquet").read_bytes() == (other / "base.tokens.parquet").read_bytes()
    assert entries_of(one / "base.json") == entries_of(other / "base.json")


def test_a_ranking_over_sessions_has_the_bytes_of_an_undisturbed_one(here, server, executed, monkeypatch):
    """Nothing of it is finished before all is: the journal alone goes along, and is the progress."""
    names = ("model", "packs", "device", "dtype")
    values = {k: TINY[k] for k in names} | {"seq_len": 40, "num_blocks": 5, "criteria": ["reap"], "out_dir": "o/rank"}
    Path("params/rank.yaml").write_text(yaml.safe_dump(values))
    executed(parts=3)
    submit([Path("params/rank.yaml")], impatient(call_seconds=20))
    (entry,) = follow()
    assert entry.state == "verified", entry.steps[-1].note + log_of(server.latest(entry.run))
    (session,) = entry.sessions
    assert entry.attempt == 2 and session.progress and session.finished == 0 and session.journal_bytes > 0

    executed(parts=-1)
    Path("params/whole.yaml").write_text(yaml.safe_dump(values))
    submit([Path("params/whole.yaml")], impatient(call_seconds=20))
    (whole,) = follow()
    folders = whole.result_folder, entry.result_folder
    for name in ("saliency.parquet", "ranking.json"):
        assert len({(folder / name).read_bytes() for folder in folders}) == 1, name
    one, other = (load_file(folder / "trace.safetensors") for folder in folders)  # its header has no order
    assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
