"""Push runs, follow them, bring their results back. Whatever is interrupted goes on when the command is repeated."""

import functools
import json
import re
import shutil
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from ..errors import KaggleError, ResultError
from ..files import sha256
from . import ledger, outcome
from .ledger import ACTIVE, Entry
from .service import LimitReached, QuotaReached, Refused, Service, Unreachable

POLL_SECONDS = 60
QUOTA_POLLS = 10  # of which one is enough while the week's quota is used up
# What the service says may lag behind: a kernel just pushed may be unknown, or show its previous version's end.
GRACE = timedelta(minutes=15)
# How long a push without an answer may take to show itself, before it is made again.
SETTLE = timedelta(minutes=5)
_ALIVE = ("QUEUED", "RUNNING")
_ENDED = ("COMPLETE", "ERROR", "CANCEL_ACKNOWLEDGED")
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


Say = Callable[[str], None]
say_now = functools.partial(print, flush=True)  # also where nobody watches but a log file


class BadDataset(KaggleError):
    """A data set that this run needs is there, but not whole."""


def push(
    params_files: Sequence[Path],
    service: Service,
    *,
    at_limit: Literal["wait", "stop"] = "wait",
    resume: bool = False,
    poll_seconds: float = POLL_SECONDS,
    say: Say = say_now,
) -> list[Entry]:
    """Queue a run for each file, and submit all, no more at a time than the account may have.

    A run that was submitted before is left alone; with ``resume`` one that failed, and whose session is over, is pushed
    again with the results it has. A run that the service refuses becomes ``failed``, and the others go on. at_limit
    ``stop``: raise LimitReached instead of waiting for a session or for quota. Raises KaggleError.
    """
    from . import build

    settings = build.read_settings()
    # A mistake in one is found before any is queued.
    plans = [build.plan(Path(file), settings) for file in params_files]
    runs = []
    for plan in plans:
        with ledger.locked():
            entry = _enqueue(plan, settings, service, resume, say)
        runs.append(entry.run)
        say(describe(entry))
        if resume and entry.state in (*ACTIVE, "ended"):
            say("    it has not failed: make kaggle-pull brings what it leaves")
        if entry.state == "failed" and not resume:
            say("    to push it again with what it has: --resume (make kaggle-push ... RESUME=1)")
    _mention_left_behind(plans, say)
    shown = ""
    while True:
        limit = None
        with ledger.locked():
            try:
                _submit_queued(service, runs, settings.gpu_sessions, say)
            except (LimitReached, Unreachable) as reason:
                limit = reason
        waiting = [e for e in map(ledger.find, runs) if e.state in ("queued", "pushing")]
        if not waiting:
            say("nothing left to submit; make kaggle-status follows the runs, make kaggle-pull brings their results")
            return [ledger.find(run) for run in runs]
        limit = limit or LimitReached(f"all {settings.gpu_sessions} GPU sessions are in use")
        if at_limit == "stop":
            raise type(limit)(f"{limit}; {len(waiting)} run(s) wait: repeat the command later")
        line = f"{_counts(service)}; waiting: {limit}"
        if line != shown:
            say(f"{datetime.now():%H:%M:%S}  {line}")
        shown = line
        time.sleep(poll_seconds * (QUOTA_POLLS if isinstance(limit, QuotaReached) else 1))


def follow(service: Service, runs: Sequence[str] = (), say: Say = say_now) -> list[Entry]:
    """Ask the service about every run that has not ended (of ``runs``, or of all the account's); returns their entries.

    One that cannot be asked about is mentioned.
    """
    entries = []
    with ledger.locked():
        for entry in _chosen(service, runs):
            try:
                entries.append(_refresh(service, entry))
            except KaggleError as error:
                say(f"{entry.run}  {error}")
    return entries


def pull(service: Service, runs: Sequence[str] = (), say: Say = say_now) -> list[Entry]:
    """Bring back the output of every run that has ended, check it, say what came.

    runs: these, also if they were settled before, say by a download that failed; else all of the account's that were
    not. A run whose results are complete and its own becomes ``verified``, and they are in ``result/``. Any other becomes
    ``failed``; what came lies in ``failed-<attempt>/`` with the log. Raises KaggleError at the end if a run could not be
    asked about.
    """
    pulled, problems = [], []
    for chosen in _chosen(service, runs):
        if not runs and chosen.state in ("verified", "failed"):
            continue
        try:
            entry = _pull_one(service, chosen.run)
        except KaggleError as error:
            problems.append(chosen.run)
            say(f"{chosen.run}  {error}")
            continue
        pulled.append(entry)
        say(describe(entry))
        if entry.state == "failed" and (trace := _last_traceback(entry)):
            say("    " + trace.replace("\n", "\n    "))
    if problems:
        raise KaggleError(f"not pulled: {', '.join(problems)}. Repeat the command later.")
    if not pulled:
        say(f"nothing to pull: {_counts(service) or 'no runs'}")
    return pulled


def _pull_one(service: Service, run: str) -> Entry:
    with ledger.locked():
        entry = ledger.find(run)
        if entry.state == "failed" or (entry.state == "verified" and not result_folder(entry).is_dir()):
            entry = _look_again(service, entry)
        entry = _refresh(service, entry)
    if entry.state != "ended":
        return entry
    with ledger.locked(run):  # only a pull takes a run out of this state, so a download need not hold up the rest
        entry = ledger.find(run)
        return _fetch(service, entry) if entry.state == "ended" else entry


def describe(entry: Entry) -> str:
    """One line: the run, its state and for how long, and what to know about it."""
    minutes = int((datetime.now(UTC) - entry.since).total_seconds() // 60)
    note = entry.steps[-1].note
    told = {"queued": note or entry.params_file, "verified": str(result_folder(entry)), "failed": note}
    told["pushing"] = "whether it arrived is not known: repeat make kaggle-push"
    return f"{entry.run}  {entry.state} {minutes} min  {told.get(entry.state, entry.url)}"


def result_folder(entry: Entry) -> Path:
    return ledger.folder(entry.run) / "result"


def failed_folder(entry: Entry, attempt: int) -> Path:
    return ledger.folder(entry.run) / f"failed-{attempt}"


def push_folder(entry: Entry) -> Path:
    return ledger.folder(entry.run) / f"push-{entry.attempt}"


def _enqueue(plan, settings, service: Service, resume: bool, say: Say) -> Entry:
    """The run's entry: the one it has, or a new one with its push folder built."""
    from . import build

    entry = ledger.find(plan.run)
    if entry:
        _require_own(service, entry)
    if entry and not (resume and entry.state == "failed"):
        return entry
    if entry and _may_be_alive(service, entry):
        say(
            f"{entry.run}  its session is still going on: stop it at {entry.url}, or pull its results when it has ended"
        )
        return entry
    attempt = entry.attempt + 1 if entry else 1
    partial = _latest_partial(entry) if entry else []
    folder = ledger.folder(plan.run)
    target, temporary = folder / f"push-{attempt}", folder / f".push-{attempt}"
    for leftover in (target, temporary):  # of a process that was killed here
        shutil.rmtree(leftover, ignore_errors=True)
    carried = [build.Carried(f.name, f, sha256(f), resume=True) for f in partial]
    build.build(plan, settings, temporary, service.owner, attempt=attempt, resume=carried)
    temporary.rename(target)
    seconds = build.session_seconds(settings)
    if entry:
        done = f"resumes with {', '.join(f.name for f in partial)}" if partial else "starts again: nothing was finished"
        changes = {"attempt": attempt, "version": None, "url": None, "session_seconds": seconds, "commit": plan.commit}
        return entry.enter("queued", done, **changes)
    entry = Entry(
        run=plan.run,
        notebook=plan.notebook,
        params_file=plan.params_file,
        params=plan.parameters,
        params_sha256=plan.params_sha256,
        code_sha256=plan.code_sha256,
        commit=plan.commit,
        ref=f"{service.owner}/{plan.run}",
        session_seconds=seconds,
        steps=[],
    )
    return entry.enter("queued")


def _may_be_alive(service: Service, entry: Entry) -> bool:
    """Whether a run that is failed to us still computes, say because it was started without one of its sources."""
    if entry.url is None:
        return False
    status, _ = service.status(entry.run) or ("UNKNOWN", "")
    return status in _ALIVE and _age_of_attempt(entry) < timedelta(seconds=entry.session_seconds) + GRACE


def _mention_left_behind(plans: Sequence, say: Say) -> None:
    """Earlier runs of the same files, with other code or parameters: nothing else would ever speak of them again."""
    present = {plan.run for plan in plans}
    digests = {plan.params_file: plan.params_sha256 for plan in plans}
    for entry in ledger.entries():
        if entry.params_file not in digests or entry.run in present:
            continue
        if entry.state == "queued":
            say(f"{entry.run}  of {entry.params_file} as it was is still queued; remove {ledger.folder(entry.run)}")
        elif entry.state == "failed" and entry.params_sha256 in digests.values() and _latest_partial(entry):
            say(f"{entry.run}  has finished packs of other code: check out {entry.commit} to resume from them")


def _submit_queued(service: Service, runs: Sequence[str], sessions: int, say: Say) -> None:
    """One round. Raises LimitReached, or Unreachable when all else is done and of some run it is not known where it is."""
    unclear = None
    for entry in _own(service):
        try:
            if entry.state == "pushing":  # a process ended between the intent and the answer
                _submit(service, entry, say)
            else:
                _refresh(service, entry)
        except Unreachable as error:  # it keeps its place among the sessions
            unclear = error
    for run in runs:
        entry = ledger.find(run)
        in_use = sum(e.state in ACTIVE for e in _own(service))
        if entry.state == "queued" and in_use < sessions:
            _submit(service, entry, say)
    if unclear:
        raise unclear


def _submit(service: Service, entry: Entry, say: Say) -> None:
    """One push at most: the intent is on disk before it, and whether it arrived is asked before it is made again."""
    again = entry.state == "pushing"
    if not again:
        try:
            for metadata in sorted(push_folder(entry).glob("*/dataset-metadata.json")):
                _ensure_dataset(service, metadata.parent)
        except BadDataset as error:
            say(describe(entry.enter("failed", str(error))))
            return
        entry = entry.enter("pushing")
    if there := _arrived(service, entry):
        entry = there
    elif again and _age_of_attempt(entry) < SETTLE:
        raise Unreachable(f"whether {entry.run} arrived is not known yet")
    else:
        entry = _push(service, entry.enter("pushing", "again: it did not arrive") if again else entry, say)
    if entry.state == "submitted":
        say(f"{entry.run}  submitted, version {entry.version}: {entry.url}")


def _arrived(service: Service, entry: Entry) -> Entry | None:
    """The entry as submitted, if the service shows a kernel of its present attempt."""
    there = service.source(entry.run)
    if there is None or f"'attempt': {entry.attempt}," not in there[0]:
        return None
    url = f"https://www.kaggle.com/code/{entry.ref}"
    return entry.enter("submitted", "is there", version=there[1], url=url)


def _push(service: Service, entry: Entry, say: Say) -> Entry:
    try:
        pushed = service.push(push_folder(entry), entry.session_seconds)
    except LimitReached as limit:
        entry.enter("queued", str(limit))
        raise
    except Refused as refusal:
        if refusal.status in (401, 403):  # the account's trouble, not the run's
            entry.enter("queued", str(refusal))
            raise
        entry = entry.enter("failed", str(refusal))
    else:
        entry = entry.enter("submitted", version=pushed.version, url=pushed.url)
        if pushed.missing:
            reason = f"no such sources, or no access to them: {', '.join(pushed.missing)}. Correct params/kaggle.yaml."
            entry = entry.enter("failed", f"{reason} It was started all the same: stop it at {entry.url}")
    if entry.state == "failed":
        say(describe(entry))
    return entry


def _ensure_dataset(service: Service, folder: Path) -> None:
    """The data set is named after its content, so one that is there is the right one."""
    slug = json.loads((folder / "dataset-metadata.json").read_text())["id"].split("/")[1]
    if service.dataset_status(slug) is None:
        service.create_dataset(folder)
    status = service.dataset_status(slug)
    if status in ("failed", "deleted"):
        raise BadDataset(f"Kaggle says that the data set {slug} has {status}: remove it there, and push again")
    if status != "ready":
        raise Unreachable(f"the data set {slug} is not ready yet ({status})")
    expected = {file.name for file in folder.iterdir()} - {"dataset-metadata.json"}
    if missing := sorted(expected - service.dataset_files(slug)):
        raise BadDataset(f"the data set {slug} came to Kaggle without {missing}: remove it there, and push again")


def _refresh(service: Service, entry: Entry) -> Entry:
    """The entry with the service's word taken in."""
    if entry.state not in ACTIVE:
        return entry
    _require_own(service, entry)
    if entry.state == "pushing" and not (entry := _arrived(service, entry) or entry).url:
        return entry
    answer = service.status(entry.run)
    if answer is None:
        return _unknown(entry)
    if entry.unknown_since:
        entry = entry.enter(entry.state, "is there again", unknown_since=None)
    status, message = answer
    first_seen, limit = entry.running_since, timedelta(seconds=entry.session_seconds) + GRACE
    if status not in _ENDED and first_seen and datetime.now(UTC) - first_seen > limit:
        status, message = "ERROR", f"the service still says {status}, long after the session's limit"
    if status in _ENDED:
        return entry.enter("ended", f"{status} {message}".strip())
    if status == "RUNNING" and entry.state == "submitted":
        return entry.enter("running")
    return entry


def _unknown(entry: Entry) -> Entry:
    """Denied for a moment, a kernel may be too new to be seen, or the service ill; denied for long, it is gone."""
    now = datetime.now(UTC)
    note = "the service has no such kernel, or does not show it to this account"
    if entry.unknown_since is None:
        return entry.enter(entry.state, note, unknown_since=now)
    return entry.enter("failed", note, unknown_since=None) if now - entry.unknown_since > GRACE else entry


def _look_again(service: Service, entry: Entry) -> Entry:
    """Reopen a run that was settled, if its kernel shows the present attempt."""
    _require_own(service, entry)
    return _arrived(service, entry) or entry


def _fetch(service: Service, entry: Entry) -> Entry:
    """Download into a fresh folder, check, and only then give the folder its name."""
    download = ledger.folder(entry.run) / ".download"
    shutil.rmtree(download, ignore_errors=True)
    download.mkdir()
    refused: list[str] = []
    try:
        log, refused = service.output(entry.run, download)
        (download / "session.log").write_text(readable_log(log))
        found = outcome.read(download)
        if found.attempt != entry.attempt:
            raise ResultError(f"this is the output of attempt {found.attempt}, expected {entry.attempt}")
        outcome.check(download, found, entry)
        if refused:
            raise ResultError(refused[0])
    except (ResultError, Refused) as error:
        if _shows_attempt_before(download, entry):
            return entry.enter("submitted", f"the service still shows attempt {entry.attempt - 1}")
        reasons = [entry.steps[-1].note, str(error).replace(f"{download}/", ""), *refused]
        if (download / outcome.OUTCOME).is_file() or not failed_folder(entry, entry.attempt).is_dir():
            _replace(download, failed_folder(entry, entry.attempt))
        return entry.enter("failed", " | ".join(dict.fromkeys(reasons)))
    _replace(download, result_folder(entry))
    return entry.enter("verified", results=found.files)


def _shows_attempt_before(download: Path, entry: Entry) -> bool:
    """Right after a second push the output may be the first one's, which may have left nothing."""
    if entry.attempt == 1 or _age_of_attempt(entry) > GRACE:
        return False
    try:
        return outcome.read(download).attempt < entry.attempt
    except ResultError:
        return True


def _chosen(service: Service, runs: Sequence[str]) -> list[Entry]:
    """The named runs, or all of the account."""
    own = {entry.run: entry for entry in _own(service)}
    if unknown := [run for run in runs if run not in own]:
        if other := ledger.find(unknown[0]):
            _require_own(service, other)
        raise KaggleError(f"no run {unknown[0]!r} in {ledger.ROOT}; it has {sorted(own) or 'none'}")
    return [own[run] for run in runs] or list(own.values())


def _own(service: Service) -> list[Entry]:
    return [entry for entry in ledger.entries() if entry.owner == service.owner]


def _require_own(service: Service, entry: Entry) -> None:
    if entry.owner != service.owner:
        raise KaggleError(
            f"{entry.run} is a run of {entry.owner}, and the credentials are of {service.owner}: use those"
        )


def _age_of_attempt(entry: Entry) -> timedelta:
    return datetime.now(UTC) - entry.submitted_at


def _latest_partial(entry: Entry) -> list[Path]:
    """Finished packs of the latest attempt that has any (each attempt begins with those of the one before)."""
    folders = [failed_folder(entry, attempt) for attempt in range(entry.attempt, 0, -1)]
    return next(filter(None, map(outcome.partial_results, folders)), [])


def _replace(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)  # of a process that was killed before it could say so in the ledger
    source.rename(target)


def _counts(service: Service) -> str:
    states = [entry.state for entry in _own(service)]
    return " · ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))


def readable_log(log: str) -> str:
    """The session's log as text: Kaggle sends a JSON list of {stream_name, time, data}."""
    try:
        lines = json.loads(log)
    except json.JSONDecodeError:
        return log
    if not isinstance(lines, list) or not all(isinstance(line, dict) for line in lines):
        return log
    return _ANSI.sub("", "".join(str(line.get("data", "")) for line in lines))


def _last_traceback(entry: Entry) -> str:
    """From the outcome, or else from the log; at most its last 30 lines."""
    folder = failed_folder(entry, entry.attempt)
    try:
        text = outcome.read(folder).error or ""
    except ResultError:  # there is none, which is already the run's note
        text = ""
    if not text and (folder / "session.log").is_file():
        text = (folder / "session.log").read_text()
    start = text.rfind("Traceback (most recent call last)")
    return "\n".join(text[start:].strip().splitlines()[-30:]) if start >= 0 else ""
