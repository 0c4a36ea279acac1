"""The driver against a service that fails in every way on record: one kernel and one result, whatever happens."""

import base64
import contextlib
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import types
import urllib.parse
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from kaggle_server import (
    HF_TOKEN,
    KEY,
    NOT_FOUND_PAGE,
    TINY,
    assert_loopback,
    run_of,
    session_environment,
    write_params,
)

from eaftlib.errors import KaggleError, ParameterError, ResultError
from eaftlib.evaluation import results
from eaftlib.kaggle import following, ledger, pulling, pushing
from eaftlib.kaggle.job import JOBS
from eaftlib.kaggle.service import LimitReached, Service


def impatient(**changes):
    return Service(**({"first_wait": 0.01, "longest_wait": 0.02, "call_seconds": 1} | changes))


def files_of(project, *names):
    return [Path(write_params(project, name, out_dir=f"outputs/{name}")) for name in names]


def submit(files, service, resume=False, **options):
    """What `kaggle push --until submitted` does."""
    said = {"say": options["say"]} if "say" in options else {}
    runs = pushing.queue(files, service, resume=resume, **said)
    return pushing.submit(service, runs, poll_seconds=0.02, **options)


def push(project, *names, **options):
    return submit(files_of(project, *names), impatient(), **options)


def push_one(project, server):
    """Push a run and wait for the end of its session; returns its name."""
    (entry,) = push(project, "eval")
    server.wait(entry.run)
    return entry.run


def states(run):
    return [step.state for step in ledger.find(run).steps]


BURSTS = [
    [429],
    [429] * 5,
    [500, 502, 503],
    ["drop before"] * 3,
    ["hang"],
    ["html", "html"],
    [503, "drop before", 429, "html"],
]


@pytest.mark.parametrize("faults", BURSTS, ids=str)
@pytest.mark.parametrize(
    "method", ["GetKernel", "GetDatasetStatus", "GetKernelSessionStatus", "ListKernelSessionOutput"]
)
def test_bursts_of_faults_are_waited_out(here, server, method, faults):
    server.inject(method, *faults)
    run = push_one(here, server)
    (entry,) = pulling.pull(impatient())
    assert entry.state == "verified" and len(server.kernels[run]) == 1
    assert server.injected == list(map(str, faults))


def test_tries_are_further_and_further_apart_and_as_the_service_asks(here, server, monkeypatch):
    waits = []
    monkeypatch.setattr("tenacity.nap.time.sleep", waits.append)
    server.inject("GetAcceleratorQuotaStatistics", *[500] * 4, 429)
    impatient(first_wait=1.0, longest_wait=5.0).quota()
    assert [1 <= waits[0] < 2.5, 2 <= waits[1] < 3.5, 4 <= waits[2] <= 5, waits[3] == 5, waits[4] == 0] == [True] * 5, (
        waits
    )


@pytest.mark.parametrize("faults", [[503], ["drop before"], ["cut"], [429, "cut", "drop before", 500]], ids=str)
def test_downloads_are_whole_or_repeated(here, server, faults):
    run = push_one(here, server)
    server.inject("GET", *faults)
    (entry,) = pulling.pull(impatient())
    assert entry.state == "verified" and len(server.injected) == len(faults)
    assert not list(entry.result_folder.glob(".*")) and entry.run == run


@pytest.mark.parametrize("fault", ["drop before", "drop after", 429, 500, 503, "html", "hang"])
def test_a_push_without_an_answer_is_not_made_twice(here, server, fault):
    """Whether it arrived is asked before it is repeated: one version, whichever way it went."""
    server.inject("SaveKernel", fault)
    run = push_one(here, server)
    assert len(server.kernels) == 1 and len(server.kernels[run]) == 1
    assert ledger.find(run).version == 1
    assert [e.state for e in pulling.pull(impatient())] == ["verified"]


def test_faults_that_do_not_end_are_reported_without_the_key(here, server):
    server.inject("GetKernelSessionStatus", *[500] * 50)
    push_one(here, server)
    said = []
    with pytest.raises(KaggleError):
        pulling.pull(impatient(), say=said.append)
    assert "status: 500: injected, with your key ***" in said[0] and KEY not in said[0]
    server.faults.clear()
    assert [e.state for e in pulling.pull(impatient())] == ["verified"]


def basic(text):
    return "Basic " + base64.b64encode(text.encode()).decode()


# Of the user name and the key, what an answer quotes.
ECHOES = {
    "as it is": lambda user, key: f"Bearer {key}",
    "base64": lambda user, key: basic(f"{user}:{key}"),
    "base64 without padding": lambda user, key: basic(f"{user}:{key}").rstrip("="),
    "base64 for URLs": lambda user, key: "?auth=" + base64.urlsafe_b64encode(f"{user}:{key}".encode()).decode(),
    "base64 of more": lambda user, key: basic(f"{user}:{key}\n and more"),
    "percent-encoded": lambda user, key: urllib.parse.quote(f"{key} {basic(f'{user}:{key}')}", safe=""),
    "JSON": lambda user, key: json.dumps({"message": json.dumps({"error": {"message": f"{key} {basic(key)}"}})}),
    "an object": lambda user, key: json.dumps({"headers": {"Authorization": basic(f"{user}:{key}"), "key": key}}),
    "where the text is cut": lambda user, key: "long " * 56 + basic(f"{user}:{key}"),
}


def test_an_answer_that_quotes_what_was_sent_is_printed_without_it(here, server):
    """Pieces of the key are looked for in what is printed, and in all base64 that can be read there."""
    service = impatient()
    users = ("tester", "tester1", "tester12")  # each puts the key elsewhere in base64's groups
    for (kind, echo), user, key in itertools.product(ECHOES.items(), users, (KEY, 'k/y+w" and=signs~0123456789')):
        service._secrets.append(key)
        server.inject("GetAcceleratorQuotaStatistics", lambda headers: f"you sent {echo(user, key)} to us")  # noqa: B023
        with pytest.raises(KaggleError) as raised:
            service.quota()
        said = urllib.parse.unquote(str(raised.value)).removeprefix("Kaggle answered 400")
        shown = said + "".join(decoded(said[start:]) for start in range(len(said)))
        pieces = (key[i : i + 5] for i in range(len(key) - 5))
        assert "***" in said and [piece for piece in pieces if piece in shown] == [], (kind, user, key)


def test_what_the_client_really_sends_is_masked(here, server):
    server.inject("GetAcceleratorQuotaStatistics", lambda headers: f"bad header {headers['Authorization']} here")
    with pytest.raises(KaggleError, match=r"Kaggle answered 400: bad header Basic \*\*\* here$"):
        impatient().quota()


def decoded(text):
    """The longest beginning that is base64, as latin-1 or UTF-8."""
    letters = re.match(r"[\w+/-]*", text, re.ASCII)[0].translate(str.maketrans("-_", "+/"))
    content = base64.b64decode(letters[: len(letters) // 4 * 4])
    return content.decode("latin-1") + content.decode("utf-8", "ignore")


def test_credentials_that_are_not_accepted_leave_the_run_queued(here, server):
    server.inject("SaveKernel", 401)
    with pytest.raises(KaggleError, match="Kaggle answered 401: injected") as raised:
        push(here, "eval")
    (entry,) = ledger.entries()
    assert (
        entry.state == "queued" and KEY not in str(raised.value) + (ledger.folder(entry.run) / "run.json").read_text()
    )
    assert push(here, "eval")[0].state == "submitted"


@pytest.mark.parametrize("lag", [1, 3])
def test_a_kernel_that_shows_itself_late_is_not_pushed_twice(here, server, monkeypatch, lag):
    """The answer was lost, and the service denies for a while that there is such a kernel."""
    monkeypatch.setattr(pushing, "SETTLE", timedelta(seconds=20))
    server.inject("SaveKernel", "drop after")
    server.on_call = lambda method, phase: (
        (method, phase) == ("SaveKernel", "after") and server.inject("GetKernel", *["unknown"] * lag)
    )
    run = push_one(here, server)
    assert server.injected.count("unknown") == lag and len(server.kernels[run]) == 1
    assert ledger.find(run).state == "submitted" and ledger.find(run).version == 1


def test_two_pushes_without_an_answer_are_each_waited_for(here, server, monkeypatch):
    """The first did not arrive; the second did, and shows itself late."""
    monkeypatch.setattr(pushing, "SETTLE", timedelta(seconds=2))
    server.inject("SaveKernel", "drop before", "drop after")
    hide = lambda *_: server.inject("GetKernel", *["unknown"] * 9)  # noqa: E731
    server.on_call = lambda method, phase: (method, phase) == ("SaveKernel", "after") and hide()
    run = push_one(here, server)
    assert server.injected.count("unknown") == 9 and len(server.kernels[run]) == 1


def test_a_push_that_arrives_after_the_client_gave_up_is_not_repeated(here, server, monkeypatch):
    monkeypatch.setattr(pushing, "SETTLE", timedelta(seconds=20))
    server.inject("SaveKernel", "late")
    run = push_one(here, server)
    assert server.injected == ["late"] and len(server.kernels[run]) == 1


REFUSALS = {
    "400": "Kaggle answered 400: injected, with your key ***",
    "404": "Kaggle answered 404: injected, with your key ***",
    "phone": "Kaggle answered 200: Your account must be phone verified to use a GPU",
    "source": "no such sources, or no access to them: someone/packs. Correct params/kaggle.yaml.",
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_refused_run_fails_with_the_reason_and_the_others_go_on(here, server, kind):
    if kind.isdigit():
        server.inject("SaveKernel", int(kind))
    elif kind == "phone":
        server.refusals.append("Your account must be phone verified to use a GPU")
    else:
        server.invalid_sources.append("someone/packs")
        server.on_call = lambda method, phase: (
            (method, phase) == ("SaveKernel", "after") and server.invalid_sources.clear()
        )
    said = []
    entries = push(here, "eval-a", "eval-b", say=said.append)
    assert [entry.state for entry in entries] == ["failed", "submitted"]
    assert REFUSALS[kind] in entries[0].steps[-1].note and any(REFUSALS[kind] in line for line in said)
    assert not any(KEY in line for line in said)
    if kind == "source":
        server.wait(entries[0].run)  # it was started all the same
    again = push(here, "eval-a", resume=True)
    assert again[0].state == "submitted" and again[0].attempt == 2


LIMITS = ["Maximum batch GPU session count of 2 reached.", "Maximum weekly GPU quota of 30.00 hours has been reached."]


@pytest.mark.parametrize("text", LIMITS)
def test_at_a_limit_it_waits(here, server, monkeypatch, text):
    """For a session a poll at a time; for the week's quota much longer."""
    waits, sleep = [], pushing.time.sleep
    monkeypatch.setattr(pushing.time, "sleep", lambda seconds: (waits.append(seconds), sleep(min(seconds, 0.05))))
    server.refusals.extend([text] * 3)
    said = []
    (entry,) = push(here, "eval", say=said.append)
    assert entry.state == "submitted" and server.calls.count("SaveKernel") == 4
    assert sum(text in line for line in said) == 1  # one line for one reason
    assert waits.count(0.2 if "quota" in text else 0.02) == 3


@pytest.mark.parametrize("text", LIMITS)
def test_at_a_limit_it_stops_when_asked_to(here, server, text):
    server.refusals.extend([text])
    with pytest.raises(LimitReached, match=r"1 run\(s\) wait"):
        push(here, "eval", at_limit="stop")
    assert server.calls.count("SaveKernel") == 1 and ledger.entries()[0].state == "queued"
    assert push(here, "eval", at_limit="stop")[0].state == "submitted"


def test_a_batch_keeps_two_sessions_going(here, server, play):
    """Six runs; each session lasts until the test lets it go."""
    gates = []

    def until_let_go(version):
        gates.append(threading.Event())
        gates[-1].wait(20)
        return play(version)

    server.session, server.session_limit = until_let_go, 99  # the limit is the driver's own here
    names = [f"eval-{i}" for i in range(6)]
    done = threading.Thread(target=push, args=(here, *names), kwargs={"say": lambda line: None})
    done.start()
    for opened in range(6):
        while len(gates) < min(opened + 2, 6):  # its neighbour has begun
            threading.Event().wait(0.01)
        gates[opened].set()
    done.join(20)
    for run in server.kernels:
        server.wait(run)
    assert server.most_sessions == 2 and len(server.kernels) == 6
    assert [e.state for e in pulling.pull(impatient())] == ["verified"] * 6


def test_an_interrupted_wait_says_that_it_can_be_repeated(here, server, tmp_path):
    environment = session_environment(tmp_path) | server.environment(tmp_path)
    assert_loopback(environment)
    server.refusals.extend([LIMITS[0]] * 99)
    command = [
        sys.executable,
        "-m",
        "eaftlib",
        "kaggle",
        "push",
        "--until",
        "submitted",
        *map(str, files_of(here, "eval")),
    ]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said = next(line for line in process.stdout if "waiting" in line)
    process.send_signal(signal.SIGINT)
    assert "1 queued; waiting: Maximum batch GPU session count" in said
    assert process.communicate(timeout=30)[1] == "interrupted; repeat the command to go on\n"
    assert process.returncode == 130 and ledger.entries()[0].state == "queued"


def test_two_terminals_push_each_run_once(here, server):
    server.session_limit = 99
    files = files_of(here, *(f"eval-{i}" for i in range(4)))

    def terminal(files):
        submit(files, impatient(), say=lambda line: None)

    terminals = [threading.Thread(target=terminal, args=(order,)) for order in (files, files[::-1])]
    for terminal in terminals:
        terminal.start()
    for terminal in terminals:
        terminal.join(60)
    assert len(server.kernels) == 4 and all(len(versions) == 1 for versions in server.kernels.values())
    assert server.calls.count("SaveKernel") == 4 and len(server.datasets) == 1


def test_a_slow_upload_holds_up_neither_status_nor_the_push_of_another_run(here, server):
    """It hangs until the test lets it go. A third terminal pushes the same run, and another that needs no upload."""
    begun, go_on = threading.Event(), threading.Event()
    server.on_upload = lambda name: (begun.set(), go_on.wait(30))
    service = impatient(call_seconds=20)
    said = []
    terminals = [threading.Thread(target=push, args=(here, "eval-a"), kwargs={"say": said.append})]
    terminals[0].start()
    assert begun.wait(20)
    run = ledger.entries()[0].run
    assert [(e.run, e.state) for e in following.follow(service)] == [(run, "queued")]
    assert pulling.pull(service, say=said.append)[0].state == "queued"
    with pytest.raises(ledger.Busy, match=rf"another process is at {run}; 1 run\(s\) wait"):
        push(here, "eval-a", at_limit="stop")
    mounted = here / "params" / "kaggle.yaml"
    sources = "inputs:\n  tiny/model: someone/tiny\n  tiny/packs: someone/tiny-packs\n"
    server.datasets |= {"someone/tiny": {}, "someone/tiny-packs": {}}
    mounted.write_text(mounted.read_text().replace("inputs:\n", sources))
    assert push(here, "eval-b")[0].state == "submitted" and ledger.find(run).state == "queued"
    go_on.set()
    terminals[0].join(30)
    assert server.calls.count("SaveKernel") == 2 and server.calls.count("CreateDataset") == 1
    assert all(len(versions) == 1 for versions in server.kernels.values()) and ledger.find(run).state == "submitted"


@pytest.mark.parametrize("answer", [None, "drop after"])
def test_a_push_that_another_terminal_sees_arrive_is_left_as_that_one_knows_it(here, server, answer):
    """Before the answer comes, status has seen the run's end."""
    seen = []

    def another(method, phase):
        if (method, phase) == ("SaveKernel", "after") and not seen:
            (entry,) = ledger.entries()
            server.wait(entry.run)
            seen.extend(e.state for e in following.follow(impatient()))

    server.on_call = another
    if answer:
        server.inject("SaveKernel", answer)
    (entry,) = submit(files_of(here, "eval"), impatient(call_seconds=20))
    assert seen == ["ended"] and entry.state == "ended"
    assert server.calls.count("SaveKernel") == 1 and len(server.kernels[entry.run]) == 1


def test_another_setting_or_another_file_is_another_run(here, server):
    runs = {push(here, "eval")[0].run}
    (here / "params" / "tiny" / "eval.yaml").unlink()
    runs |= {submit([Path(write_params(here, "eval", num_blocks=2))], impatient())[0].run}
    (here / "tiny" / "packs").unlink()
    import world

    world.write_packs(here / "tiny" / "packs", sizes=(20, 14, 9))
    runs |= {push(here, "eval")[0].run}
    assert len(runs) == len(server.kernels) == 3


def spoil_schema(folder, content):
    text = (folder / "base.json").read_text()
    (folder / "base.json").write_text(text.replace('"ppl"', '"pp1"', 1))


def spoil_number(folder, content):
    text = (folder / "base.json").read_text()
    (folder / "base.json").write_text(text.replace('"tok_s_pred": ', '"tok_s_pred": NaN, "old": ', 1))


def spoil_blocks(folder, content):
    text = (folder / "base.json").read_text()
    (folder / "base.json").write_text(text.replace('"num_blocks": 3', '"num_blocks": 4', 1))


def spoil_length(folder, content):
    result = json.loads((folder / "base.json").read_text())
    del result["packs"][1]["seq"]["40"]
    (folder / "base.json").write_text(json.dumps(result))


def spoil_tokens(folder, content):
    import pyarrow.parquet as pq

    table = pq.read_table(folder / "base.tokens.parquet")
    pq.write_table(table.slice(0, len(table) - 1), folder / "base.tokens.parquet")


def spoil_meta(**changes):
    def spoil(folder, content):
        result = json.loads((folder / "base.json").read_text())
        result["meta"] |= changes
        (folder / "base.json").write_text(json.dumps(result))

    return spoil


def spoil_code(folder, content):
    text = (folder / "base.json").read_text()
    (folder / "base.json").write_text(text.replace('"code_sha256": "', '"code_sha256": "0', 1))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda f, c: c.update(run="eaft-another"), "this is another run's output"),
        (lambda f, c: c.update(params_sha256="0"), "params_sha256 is 0"),
        (lambda f, c: c.update(code_sha256="0"), "code_sha256 is 0"),
        (lambda f, c: c.update(attempt=7), "output of attempt 7"),
        (lambda f, c: c.update(status="running"), "the session ended before its notebook did"),
        (lambda f, c: c.update(status="failed", error="Traceback\nPackError: no rows"), "PackError: no rows"),
        (lambda f, c: c.update(status="odd"), "is no outcome of a session: status"),
        (lambda f, c: (f / "base.json").unlink(), "base.json'] are missing"),
        (spoil_schema, "base.json: packs.0.seq.24.model.ppl: Field required"),
        (spoil_number, "base.json is not JSON (found NaN"),
        (spoil_blocks, "meta.num_blocks says, 4"),
        (spoil_length, "has no pack_a at 40"),
        (spoil_code, "base.json: code_sha256 is 0"),
        (spoil_tokens, "base.tokens.parquet is not the file that base.json was written with"),
        (lambda f, c: (f / "base.tokens.parquet").unlink(), "base.tokens.parquet'] are missing"),
        (spoil_meta(model_id="tiny/other"), "base.json: model_id is tiny/other, expected tiny/model"),
        (spoil_meta(dataset_repo="tiny/other"), "base.json: dataset_repo is tiny/other"),
        (spoil_meta(label="other"), "base.json: label is other, expected base"),
        (spoil_meta(entropy_topk=7), "base.json: entropy_topk is 7"),
    ],
)
def test_a_result_that_is_not_the_runs_own_and_sound_is_a_failure(here, server, play, change, words):
    server.session = lambda version: play(version, change=change)
    run = push_one(here, server)
    said = []
    (entry,) = pulling.pull(impatient(), say=said.append)
    assert entry.state == "failed" and words in entry.steps[-1].note, entry.steps[-1].note
    assert words in said[0]
    assert not entry.result_folder.exists()
    assert (entry.left_folder(1) / "session.log").read_text() == "EAFT-RUN\n" and entry.run == run


@pytest.mark.parametrize("name", ["base.json", "base.tokens.parquet"])
def test_files_of_another_session_are_not_taken_for_the_runs(here, server, name):
    """The outcome is this run's; one file beside it is not, sound as it may look."""
    file = server.latest(push_one(here, server)).working / name
    file.write_bytes(file.read_bytes().replace(b'"python": "3', b'"python": "4')[: -1 if name.endswith("t") else None])
    assert f"{name} is not the file that the session wrote" in pulling.pull(impatient())[0].steps[-1].note


@pytest.mark.parametrize("status", [404, 200])
@pytest.mark.parametrize("name", ["eaft_run.json", "base.json", "base.tokens.parquet"])
def test_a_404_page_is_not_a_result(here, server, name, status):
    """With the status of one or, as proxies do, with another."""
    push_one(here, server)
    server.missing_files[name] = status
    (entry,) = pulling.pull(impatient())
    words = {404: f"{name}: Kaggle answered 404: 404 We can't find that page.", 200: name}
    assert entry.state == "failed" and words[status] in entry.steps[-1].note
    folder = entry.left_folder(1)
    kept = [f.name for f in folder.iterdir() if NOT_FOUND_PAGE in f.read_bytes()]
    assert kept == ([name] if status == 200 else []) and (folder / "session.log").is_file()


def test_a_session_without_any_output_keeps_its_log_and_shows_the_last_traceback(here, server):
    lines = [
        "Traceback (most recent call last)\n  one\nKeyError: 'first'\n",
        "Traceback (most recent call last):\n",
        "  two\n",
    ]
    lines.append("MemoryError: \x1b[31mof the image\x1b[0m\n")

    def dies(version):
        version.log = json.dumps([{"stream_name": "stderr", "time": 1, "data": line} for line in lines])
        return "ERROR"

    server.session = dies
    push_one(here, server)
    said = []
    (entry,) = pulling.pull(impatient(), say=said.append)
    assert entry.state == "unfinished" and entry.steps[-1].note.startswith("session 1 left 0 passes")
    assert "ERROR | eaft_run.json does not exist" in entry.steps[-1].note
    assert said[1].split() == "Traceback (most recent call last): two MemoryError: of the image".split()


def test_a_cancelled_session_is_a_failure(here, server):
    server.session = lambda version: "CANCEL_ACKNOWLEDGED"
    push_one(here, server)
    assert pulling.pull(impatient())[0].steps[-1].note.startswith("CANCEL_ACKNOWLEDGED")


def test_stale_running_is_waited_for(here, server):
    run = push_one(here, server)
    server.latest(run).stale = 2
    seen = [pulling.pull(impatient())[0].state for _ in range(3)]
    assert seen == ["running", "running", "verified"]


def backdate(run, **age):
    """As if every step had been taken that long ago."""
    entry = ledger.find(run)
    at = (datetime.now(UTC) - timedelta(**age)).isoformat()
    steps = [step.model_copy(update={"at": at}) for step in entry.steps]
    unknown_since = entry.unknown_since and entry.unknown_since - timedelta(**age)
    ledger.save(entry.model_copy(update={"steps": steps, "unknown_since": unknown_since}))


def test_running_long_after_the_sessions_limit_is_not_believed(here, server):
    run = push_one(here, server)
    server.latest(run).stale = 99
    assert pulling.pull(impatient())[0].state == "running"
    backdate(run, hours=11)
    assert pulling.pull(impatient())[0].state == "running"
    backdate(run, hours=12)
    assert pulling.pull(impatient())[0].state == "verified"  # the output was there all along


def test_a_kernel_that_is_gone_is_a_failure_but_not_at_once(here, server):
    run = push_one(here, server)
    del server.kernels[run]
    assert pulling.pull(impatient())[0].state == "submitted"
    assert pulling.pull(impatient())[0].state == "submitted"
    backdate(run, minutes=16)
    (entry,) = pulling.pull(impatient())
    assert entry.state == "failed" and entry.steps[-1].note.startswith("the service has no such kernel")


def test_a_running_session_that_is_denied_once_is_not_given_up(here, server):
    run = push_one(here, server)
    server.latest(run).stale = 2
    assert pulling.pull(impatient())[0].state == "running"
    backdate(run, hours=5)
    server.inject("GetKernelSessionStatus", "unknown")
    assert [pulling.pull(impatient())[0].state for _ in range(3)] == ["running", "running", "verified"]
    assert ledger.find(run).unknown_since is None


def test_a_session_that_was_given_up_as_overdue_stays_so_while_it_says_running(here, server):
    """Each look must not begin another half day of waiting."""
    run = push_one(here, server)
    server.latest(run).stale = 99
    pulling.pull(impatient())
    server.extra_files = {"../x": b""}
    backdate(run, hours=13)
    assert pulling.pull(impatient())[0].state == "failed"
    assert pulling.pull(impatient(), [run])[0].state == "failed"
    server.extra_files = {}
    assert pulling.pull(impatient(), [run])[0].state == "verified"


def test_a_push_whose_answer_was_lost_is_found_by_status_too(here, server):
    server.inject("SaveKernel", "drop after")
    server.inject("GetKernel", "unknown")
    server.on_call = lambda method, phase: (
        (method, phase) == ("SaveKernel", "after") and server.inject("GetKernel", "unknown")
    )
    with pytest.raises(KaggleError, match=r"1 run\(s\) wait"):
        push(here, "eval", at_limit="stop")
    (entry,) = ledger.entries()
    assert "whether it arrived is not known: repeat make kaggle-push" in following.describe(entry)
    assert [e.state for e in following.follow(impatient())] == ["pushing"]
    server.wait(entry.run)
    assert [e.state for e in pulling.pull(impatient())] == ["verified"] and len(server.kernels[entry.run]) == 1


def test_a_status_that_cannot_be_had_holds_up_neither_the_others_nor_a_free_session(here, server):
    first, *_ = push(here, "eval-a")
    server.wait(first.run)
    server.inject("GetKernelSessionStatus", *[500] * 8)
    (second,) = push(here, "eval-b")
    assert second.state == "submitted" and ledger.find(first.run).state == "submitted"
    server.wait(second.run)
    server.inject("GetKernelSessionStatus", *[500] * 8)
    said = []
    assert [e.run for e in following.follow(impatient(), say=said.append)] == [second.run] and first.run in said[0]


def test_the_end_of_the_attempt_before_is_not_taken_for_this_ones(here, server, play):
    """Right after a second push the service still shows the first version, complete with its output."""
    server.session = lambda version: play(
        version, status="ERROR", change=lambda f, c: c.update(status="failed", error="E: x")
    )
    run = push_one(here, server)
    assert pulling.pull(impatient())[0].state == "failed"
    server.session = play
    push(here, "eval", resume=True)
    server.wait(run)
    newest = server.kernels[run].pop()
    assert pulling.pull(impatient())[0].state == "submitted"
    server.kernels[run].append(newest)
    (entry,) = pulling.pull(impatient())
    assert entry.state == "verified" and entry.attempt == 2 and entry.version == 2


def test_an_attempt_before_that_left_nothing_is_not_taken_for_this_one(here, server, play):
    """The first session left no outcome at all; right after the second push, the service still shows that."""
    server.session = lambda version: "ERROR"
    run = push_one(here, server)
    assert pulling.pull(impatient())[0].state == "unfinished"
    server.session = play
    push(here, "eval")
    server.wait(run)
    newest = server.kernels[run].pop()
    assert pulling.pull(impatient())[0].state == "submitted"
    backdate(run, minutes=16)
    assert pulling.pull(impatient())[0].state == "failed"  # by then it is this one's
    server.kernels[run].append(newest)
    assert pulling.pull(impatient(), [run])[0].state == "verified"


def test_a_session_first_seen_running_after_a_long_queue_is_alive(here, server):
    run = push_one(here, server)
    server.latest(run).stale = 99
    backdate(run, hours=13)
    assert pulling.pull(impatient())[0].state == "running"


@pytest.mark.parametrize("name", ["eaft_run.json", "base.json", "base.tokens.parquet"])
def test_a_file_that_was_refused_for_a_moment_is_fetched_with_its_next_address(here, server, name):
    push_one(here, server)
    listed = []

    def heals(method, phase):
        listed.extend([method] * ((method, phase) == ("ListKernelSessionOutput", "before")))
        if len(listed) == 2:
            server.missing_files.clear()

    server.missing_files[name], server.on_call = 404, heals
    assert pulling.pull(impatient())[0].state == "verified" and len(listed) == 2


def test_a_run_that_was_given_up_is_looked_at_again_when_it_is_named(here, server):
    """A bad hour of the service must not cost a session that has ended well."""
    run = push_one(here, server)
    server.missing_files["base.tokens.parquet"] = 404
    assert pulling.pull(impatient())[0].state == "failed"
    assert pulling.pull(impatient()) == []
    assert pulling.pull(impatient(), [run])[0].state == "failed"
    server.missing_files.clear()
    (entry,) = pulling.pull(impatient(), [run])
    assert entry.state == "verified" and len(server.kernels[run]) == 1
    shutil.rmtree(entry.result_folder)
    assert pulling.pull(impatient(), [run])[0].state == "verified" and entry.result_folder.is_dir()
    calls = len(server.calls)
    assert pulling.pull(impatient(), [run])[0].state == "verified" and len(server.calls) == calls


def test_a_second_download_that_is_worse_does_not_replace_the_first(here, server, play):
    server.session = lambda version: play(version, change=lambda f, c: c.update(status="failed", error="E: x"))
    run = push_one(here, server)
    (entry,) = pulling.pull(impatient())
    server.missing_files["eaft_run.json"] = 404
    assert pulling.pull(impatient(), [run])[0].state == "failed"
    assert (entry.left_folder(1) / "eaft_run.json").is_file()


def test_runs_of_another_account_are_left_alone(here, server, monkeypatch):
    run = push_one(here, server)
    backdate(run, hours=1)
    other = impatient()
    other.owner = "other"
    said = []
    assert pulling.pull(other, say=said.append) == [] and said == ["nothing to pull: no runs"]
    for call in (lambda: pulling.pull(other, [run]), lambda: submit(files_of(here, "eval"), other)):
        with pytest.raises(KaggleError, match=f"{run} is a run of tester, and the credentials are of other"):
            call()
    assert states(run) == ["queued", "pushing", "submitted"]


def test_a_session_that_still_computes_is_not_pushed_again(here, server):
    """Its sources were not all there, so it is failed to us; on Kaggle it goes on."""
    go_on = threading.Event()
    server.session = lambda version: go_on.wait(30) and "ERROR"
    server.invalid_sources.append("someone/packs")
    said = []
    (entry,) = push(here, "eval", say=said.append)
    assert entry.state == "failed" and f"stop it at {entry.url}" in entry.steps[-1].note and entry.version == 1
    server.invalid_sources.clear()
    assert push(here, "eval", resume=True, say=said.append)[0].attempt == 1
    assert "its session is still going on" in " ".join(said) and len(server.kernels[entry.run]) == 1
    go_on.set()
    server.wait(entry.run)
    assert push(here, "eval", resume=True)[0].attempt == 2


def test_a_resumed_run_gets_the_present_settings(here, server, play):
    server.session = lambda version: play(version, change=lambda f, c: c.update(status="failed", error="E: x"))
    run = push_one(here, server)
    pulling.pull(impatient())
    settings = here / "params" / "kaggle.yaml"
    settings.write_text(settings.read_text().replace("session_hours: 11.5", "session_hours: 3"))
    server.session = play
    push(here, "eval", resume=True)
    limit = server.wait(run).request["sessionTimeoutSeconds"]
    assert limit == ledger.find(run).session_seconds == 3 * 3600
    assert run_of(server.latest(run))["deadline_seconds"] < limit


@pytest.mark.parametrize("name", ["base.json", "base.tokens.parquet"])
@pytest.mark.parametrize("content", [NOT_FOUND_PAGE, b"", b'{"packs": []}', b"\xff\x00PAR1"], ids=range(4))
def test_damaged_partial_results_are_not_carried_along(here, server, play, name, content):
    def damage(folder, outcome):
        outcome.update(status="failed", error="E: x")
        (folder / name).write_bytes(content)

    server.session = lambda version: play(version, change=damage)
    run = push_one(here, server)
    pulling.pull(impatient())
    push(here, "eval", resume=True)
    assert ledger.find(run).steps[-3].note == "starts again: nothing was finished"


def test_a_parquet_with_damaged_pages_is_not_carried_along(here, server, play):
    """Its ends are whole, so that it opens; what lies between is not."""

    def damage(folder, outcome):
        outcome.update(status="failed", error="E: x")
        file = folder / "base.tokens.parquet"
        content = bytearray(file.read_bytes())
        content[8:-800] = bytes(len(content) - 808)
        file.write_bytes(content)

    server.session = lambda version: play(version, change=damage)
    run = push_one(here, server)
    pulling.pull(impatient())
    with pytest.raises(ResultError, match=r"base\.tokens\.parquet cannot be read"):
        results.read_tokens(ledger.find(run).left_folder(1) / "base.tokens.parquet", 3)
    push(here, "eval", resume=True)
    assert ledger.find(run).steps[-3].note == "starts again: nothing was finished"


def test_one_run_that_cannot_be_asked_about_does_not_hold_up_the_others(here, server):
    server.session_limit = 9
    first, second = push(here, "eval-a", "eval-b")
    server.wait(first.run), server.wait(second.run)
    server.inject("GetKernelSessionStatus", *[500] * 8)
    said = []
    with pytest.raises(KaggleError, match=f"^not pulled: {first.run}"):
        pulling.pull(impatient(), say=said.append)
    assert [ledger.find(e.run).state for e in (first, second)] == ["submitted", "verified"]


def test_a_kernel_that_is_gone_after_its_end_is_a_failure(here, server):
    run = push_one(here, server)
    assert following.follow(impatient())[0].state == "ended"
    del server.kernels[run]
    (entry,) = pulling.pull(impatient())
    assert entry.state == "failed" and "has no output, or is not there" in entry.steps[-1].note


def test_what_the_client_will_not_send_is_a_refusal_and_the_others_go_on(here, server, monkeypatch):
    real = pushing._enqueue

    def and_lose(plan, *rest):  # the push folder of one of them
        entry = real(plan, *rest)
        if "eval-a" in entry.run:
            shutil.rmtree(entry.push_folder)
        return entry

    monkeypatch.setattr(pushing, "_enqueue", and_lose)
    first, second = push(here, "eval-a", "eval-b")
    assert first.state == "failed" and "Invalid folder" in first.steps[-1].note and second.state == "submitted"


def test_what_was_queued_for_older_parameters_is_mentioned(here, server):
    server.refusals.extend([LIMITS[0]])
    with pytest.raises(LimitReached):
        push(here, "eval", at_limit="stop")
    (old,) = ledger.entries()
    (here / old.params_file).write_text((here / old.params_file).read_text().replace("num_blocks: 3", "num_blocks: 2"))
    said = []
    submit([Path(old.params_file)], impatient(), say=said.append)
    assert f"{old.run}  of {old.params_file} as it was is still queued; remove kaggle_runs/{old.run}" in said


def test_results_of_older_code_that_could_be_resumed_are_mentioned(here, server, play, monkeypatch):
    from eaftlib import project

    server.session = lambda version: play(version, change=lambda f, c: c.update(status="failed", error="E: x"))
    run = push_one(here, server)
    pulling.pull(impatient())
    monkeypatch.setattr(project, "code_sha256", lambda package=None: "other")
    said = []
    push(here, "eval", say=said.append)
    assert f"{run}  has finished packs of other code: check out {ledger.find(run).commit} to resume from them" in said


def test_waiting_for_the_quota_does_not_fill_the_ledger(here, server, monkeypatch):
    monkeypatch.setattr(pushing, "QUOTA_POLLS", 1)  # how long it waits is another test's
    server.refusals.extend([LIMITS[1]] * 30)
    (entry,) = push(here, "eval")
    assert server.calls.count("SaveKernel") == 31
    assert states(entry.run) == ["queued", "pushing", "queued", "pushing", "submitted"]


def test_a_copy_of_a_runs_folder_is_no_run(here, server):
    run = push_one(here, server)
    shutil.copytree(ledger.folder(run), ledger.folder("backup"))
    with pytest.raises(KaggleError, match=f"backup/run.json is of the run {run}"):
        pulling.pull(impatient())


def test_a_log_of_another_shape_is_kept_as_it_is():
    for log in ("plain text", "[1, 2]", '{"a": 1}', '["a"]'):
        assert pulling.readable_log(log) == log
    assert pulling.readable_log('[{"data": "a"}, {"time": 1}]') == "a"


def test_a_result_that_lacks_a_pack_is_a_failure_also_where_none_is_named(here, server):
    """only: null means every pack and UNION; what is there has UNION and pack_a."""
    (entry,) = submit([Path(write_params(here, "eval", only=None))], impatient())
    server.wait(entry.run)
    (entry,) = pulling.pull(impatient())
    assert entry.state == "failed" and "base.json has no pack_b at 24" in entry.steps[-1].note


def asked(**changes):
    """An entry of an evaluation that asked for these."""
    keep = [{"label": "base"}, {"label": "half", "ranking": "r", "criterion": "reap", "keep_n": 6} | changes]
    return types.SimpleNamespace(
        notebook="03_evaluate", code_sha256="c", params=TINY_DEFAULTS | {"label": None, "keep_set": keep}
    )


TINY_DEFAULTS = TINY | {
    "pack_files": None,
    "rows": "all",
    "entropy_topk": 20,
    "cc_quantile": 0.15,
    "max_gpu_memory": None,
}


@pytest.mark.parametrize(
    "label, chosen, entry, words",
    [
        ("half", {"criterion": "reap", "keep_n": 8}, asked(), None),  # 6 of 8 experts, rounded up to a multiple of 4
        ("half", {"criterion": "reap", "keep_n": 6}, asked(multiple_of=2), None),
        ("half", {"criterion": "ean", "keep_n": 8}, asked(), "criterion is ean, expected reap"),
        ("half", {"criterion": "reap", "keep_n": 4}, asked(), "keep_n is 4, expected 8"),
        ("half", None, asked(), "criterion is None, expected reap"),
        ("base", None, asked(), None),
    ],
)
def test_the_keep_set_is_the_one_that_was_asked_for(scored, tmp_path, label, chosen, entry, words):
    content = json.loads((scored / "base.json").read_text())
    content["meta"] |= {"label": label, "keep_set": chosen, "code_sha256": "c", "num_experts": 8, "top_k": 2}
    (tmp_path / f"{label}.json").write_text(json.dumps(content))
    with pytest.raises(ResultError, match=words) if words else contextlib.nullcontext():
        JOBS["03_evaluate"].verify(tmp_path / f"{label}.json", entry)


def test_a_token_in_the_log_is_not_kept(here, server, play):
    def talks(version):
        status = play(version)
        version.log = json.dumps([{"data": f"401 for {HF_TOKEN}, with {KEY}\n"}])
        return status

    server.session = talks
    run = push_one(here, server)
    (entry,) = pulling.pull(impatient())
    assert (entry.result_folder / "session.log").read_text() == "401 for ***, with ***\n" and run


def test_the_key_is_not_said_when_signing_in_fails(server, tmp_path):
    environment = session_environment(tmp_path) | server.environment(tmp_path) | {"KAGGLE_API_TOKEN": KEY}
    for name in ("KAGGLE_USERNAME", "KAGGLE_KEY"):
        del environment[name]
    assert_loopback(environment)
    server.inject("IntrospectToken", *[400] * 9)
    command = [sys.executable, "-m", "eaftlib", "kaggle", "status"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and KEY not in done.stdout + done.stderr and "Traceback" not in done.stderr


HOSTILE = [
    "../escaped", "../../escaped", "/tmp/escaped-absolute", "a/../../escaped", "..\\escaped", "C:\\escaped", "C:escaped",
    "a//../escaped", ".", "..", "", "a/./b", "nul\0byte", "n" * 300, "good/../../../../escaped",
]  # fmt: skip


def test_output_names_cannot_leave_the_runs_folder(here, server, tmp_path):
    push_one(here, server)
    server.extra_files = dict.fromkeys(HOSTILE, b"hostile")
    (entry,) = pulling.pull(impatient())
    assert entry.state == "failed" and "would leave the run's folder" in entry.steps[-1].note
    kept = [p for p in tmp_path.rglob("*") if p.is_file() and p.read_bytes() == b"hostile"]
    assert kept == [] and not Path("/tmp/escaped-absolute").exists()


def test_more_files_than_a_page_come_back(here, server):
    push_one(here, server)
    server.extra_files = {f"plots/{i:02}.png": b"%d" % i for i in range(60)}
    (entry,) = pulling.pull(impatient())
    assert entry.state == "verified"
    assert all((entry.result_folder / name).read_bytes() == c for name, c in server.extra_files.items())
    assert server.calls.count("ListKernelSessionOutput") == 4


def test_pages_without_end_are_refused(here, server, monkeypatch):
    push_one(here, server)
    server.extra_files = {f"{i}": b"" for i in range(5000)}
    said = []
    with pytest.raises(KaggleError, match="not pulled: eaft-tiny-eval"):
        pulling.pull(impatient(), say=said.append)
    assert "more than 500 output files" in said[0]


def test_a_data_set_that_came_without_a_file_is_not_used(here, server, monkeypatch):
    create = server.CreateDataset
    monkeypatch.setattr(server, "CreateDataset", lambda r: create(r | {"files": r["files"][1:]}))
    (entry,) = push(here, "eval")
    assert entry.state == "failed" and "came to Kaggle without ['tiny__" in entry.steps[-1].note and not server.kernels


def test_an_unknown_run_is_named(here, server):
    run = push_one(here, server)
    with pytest.raises(KaggleError, match=f"no run 'eaft-x' in kaggle_runs; it has \\['{run}'"):
        pulling.pull(impatient(), ["eaft-x"])


def test_a_damaged_ledger_is_named(here, server):
    run = push_one(here, server)
    (here / "kaggle_runs" / run / "run.json").write_text('{"run": 3}')
    with pytest.raises(KaggleError, match=r"run\.json is no ledger of a run"):
        pulling.pull(impatient())


def test_nothing_is_pushed_when_one_file_of_a_batch_is_wrong(here, server):
    with pytest.raises(ParameterError, match=r"params/tiny/b\.yaml: num_blocks"):
        submit([Path(write_params(here, "a")), Path(write_params(here, "b", num_blocks=0))], impatient())
    assert not server.calls.count("SaveKernel") and not ledger.entries()


def test_without_credentials_it_says_what_to_do(here, server, tmp_path):
    environment = session_environment(tmp_path) | server.environment(tmp_path)
    assert_loopback(environment)
    for name in ("KAGGLE_USERNAME", "KAGGLE_KEY"):
        del environment[name]
    done = subprocess.run(
        [sys.executable, "-m", "eaftlib", "kaggle", "status"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert "no Kaggle credentials, or none that Kaggle takes: run `kaggle auth login`" in done.stderr


_IMPATIENT_STATUS = """
import functools, sys
from eaftlib.__main__ import main
from eaftlib.kaggle import service
service.Service = functools.partial(service.Service, first_wait=0.01, longest_wait=0.02)
sys.exit(main(["kaggle", "status"]))
"""


def test_an_access_token_signs_in_through_a_burst_of_faults(server, tmp_path):
    """The client asks the service who the token is; its name is the runs' owner, and it is never said."""
    environment = session_environment(tmp_path) | server.environment(tmp_path) | {"KAGGLE_API_TOKEN": KEY}
    for name in ("KAGGLE_USERNAME", "KAGGLE_KEY"):
        del environment[name]
    assert_loopback(environment)
    server.inject("IntrospectToken", 503, "drop before")
    server.inject("GetAcceleratorQuotaStatistics", 400)
    command = [sys.executable, "-c", _IMPATIENT_STATUS]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == "Kaggle answered 400: injected, with your key ***\n" and done.returncode == 1
    assert subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
