"""Queue runs and submit them, no more at a time than the account may have. Repeated, it goes on where it was stopped."""

import json
import shutil
import time
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

from ..errors import KaggleError
from . import build, forecast, ledger, sessions
from .build import Plan, Settings
from .following import Say, arrived, counts, describe, refresh, say_now
from .ledger import Busy, Entry
from .service import LimitReached, QuotaReached, Refused, Service, Unreachable
from .states import Name

POLL_SECONDS = 60
QUOTA_POLLS = 10  # of which one is enough while the week's quota is used up
# How long a push without an answer may take to show itself, before it is made again.
SETTLE = timedelta(minutes=5)


class BadDataset(KaggleError):
    """A data set that this run needs is there, but not whole."""


def queue(params_files: Sequence[Path], service: Service, *, resume: bool = False, say: Say = say_now) -> list[str]:
    """Say what new runs will take and queue one for each file; returns the runs' names.

    A run that was submitted before is left alone, but one that its session left unfinished goes on in another; with
    ``resume`` also one that failed, and whose session is over. Raises KaggleError.
    """
    settings = build.read_settings()
    # A mistake in one is found before any is queued.
    plans = [build.plan(Path(file), settings) for file in params_files]
    forecast.announce([plan for plan in plans if not ledger.find(plan.run)], settings, service, say)
    runs = [_queue(plan, settings, service, resume, say) for plan in plans]
    _mention_left_behind(plans, say)
    return runs


def submit(
    service: Service,
    runs: Sequence[str],
    *,
    at_limit: Literal["wait", "stop"] = "wait",
    poll_seconds: float = POLL_SECONDS,
    say: Say = say_now,
) -> list[Entry]:
    """Submit all that are queued, no more at a time than the account may have.

    A run that the service refuses becomes ``failed``, and the others go on. at_limit ``stop``: raise LimitReached instead of
    waiting for a session or for quota. Raises KaggleError.
    """
    settings, shown = build.read_settings(), ""
    while True:
        limit = submit_queued(service, runs, settings.gpu_sessions, say)
        waiting = [run for run in runs if ledger.find(run).state in ("queued", "pushing")]
        if not waiting:
            say("nothing left to submit; make kaggle-follow stays until all are verified, make kaggle-pull looks once")
            return [ledger.find(run) for run in runs]
        if at_limit == "stop":
            raise type(limit)(f"{limit}; {len(waiting)} run(s) wait: repeat the command later")
        line = f"{counts(service)}; waiting: {limit}"
        if line != shown:
            say(f"{datetime.now():%H:%M:%S}  {line}")
        shown = line
        time.sleep(poll_seconds * (QUOTA_POLLS if isinstance(limit, QuotaReached) else 1))


def _queue(plan: Plan, settings: Settings, service: Service, resume: bool, say: Say) -> str:
    """See to it that the ledger has the run, say how it stands, return its name."""
    with ledger.locked():
        entry = ledger.find(plan.run)
        if entry:
            entry.require_owner(service.owner)
        else:
            entry = _enqueue(plan, settings, service.owner)
    if entry.state == "unfinished" or (resume and entry.state == "failed"):
        entry = sessions.go_on(service, plan.run, settings, say)
    say(describe(entry))
    if resume and (entry.active or entry.state == "ended"):
        say("    it has not failed: make kaggle-pull brings what it leaves")
    if entry.state == "failed" and not resume:
        say("    to push it again with what it has: --resume (make kaggle-push ... RESUME=1)")
    return entry.run


def _enqueue(plan: Plan, settings: Settings, owner: str) -> Entry:
    """A new run, with its push folder built."""
    entry = Entry(
        run=plan.run,
        notebook=plan.notebook,
        params_file=plan.params_file,
        params=plan.parameters,
        params_sha256=plan.params_sha256,
        code_sha256=plan.code_sha256,
        commit=plan.commit,
        ref=f"{owner}/{plan.run}",
        session_seconds=build.session_seconds(settings),
        steps=[],
    )
    _build(plan, settings, entry)
    return entry.enter("queued")


def _build(plan: Plan, settings: Settings, entry: Entry) -> None:
    """The push folder of the first attempt: whole, or not there."""
    target = entry.push_folder
    temporary = target.with_name(f".{target.name}")
    for leftover in (target, temporary):  # of a process that was killed here
        shutil.rmtree(leftover, ignore_errors=True)
    build.build(plan, settings, temporary, entry.owner)
    temporary.rename(target)


def _mention_left_behind(plans: Sequence[Plan], say: Say) -> None:
    """Earlier runs of the same files, with other code or parameters: nothing else would ever speak of them again."""
    present = {plan.run for plan in plans}
    digests = {plan.params_file: plan.params_sha256 for plan in plans}
    for entry in ledger.entries():
        if entry.params_file not in digests or entry.run in present:
            continue
        if entry.state == "queued":
            say(f"{entry.run}  of {entry.params_file} as it was is still queued; remove {ledger.folder(entry.run)}")
        elif entry.params_sha256 in digests.values() and sessions.has_partial(entry):
            if entry.state == "unfinished":
                say(
                    f"{entry.run}  is unfinished, with other code: make kaggle-follow RUNS={entry.run} goes on with that"
                )
            elif entry.state == "failed":
                say(f"{entry.run}  has finished packs of other code: check out {entry.commit} to resume from them")


def submit_queued(
    service: Service, runs: Sequence[str], gpu_sessions: int, say: Say
) -> LimitReached | Unreachable | Busy:
    """One round; returns why the runs wait that it has left queued, or of which it is not known whether they arrived."""
    try:
        _submit_in_turn(service, runs, gpu_sessions, say)
    except (LimitReached, Unreachable, Busy) as reason:
        return reason
    return LimitReached(f"all {gpu_sessions} GPU sessions are in use")


def _submit_in_turn(service: Service, runs: Sequence[str], gpu_sessions: int, say: Say) -> None:
    """Raises LimitReached, or Unreachable or Busy when all else is done and of some run it is not known where it is."""
    unclear = None
    for entry in ledger.owned_by(service.owner):
        try:
            if entry.state == "pushing":  # a process ended between the intent and the answer
                _submit(service, entry.run, gpu_sessions, say)
            else:
                with ledger.locked():
                    refresh(service, ledger.find(entry.run))
        except (Unreachable, Busy) as error:  # it keeps its place among the sessions
            unclear = error
    for run in runs:
        if ledger.find(run).state == "queued" and _in_use(service) < gpu_sessions:
            try:
                _submit(service, run, gpu_sessions, say)
            except Busy as error:
                unclear = error
    if unclear:
        raise unclear


def _in_use(service: Service) -> int:
    return sum(entry.active for entry in ledger.owned_by(service.owner))


def _submit(service: Service, run: str, gpu_sessions: int, say: Say) -> None:
    """One push at most: the intent is on disk before it, and whether it arrived is asked before it is made again.

    The others may look and decide meanwhile, but none is at this run. Raises Busy where one is.
    """
    with ledger.locked(run, seconds=0):
        again = ledger.find(run).state == "pushing"
        if not again and not (_ensure_datasets(service, run, say) and _take_session(service, run, gpu_sessions)):
            return
        with ledger.locked():
            before = ledger.find(run)
            entry = arrived(service, before)
        if entry is None:
            if again and before.age < SETTLE:
                raise Unreachable(f"whether {run} arrived is not known yet")
            if again:
                _settle(run, "pushing", "again: it did not arrive")
            entry = _push(service, run, say)
    if entry.state == "submitted":
        say(f"{run}  submitted, version {entry.version}: {entry.url}")


def _ensure_datasets(service: Service, run: str, say: Say) -> bool:
    """Whether all that the run needs is there, and whole; if not, it has failed."""
    folder = ledger.find(run).push_folder
    try:
        for metadata in sorted(folder.glob("*/dataset-metadata.json")):
            _ensure_dataset(service, metadata.parent)
    except BadDataset as error:
        with ledger.locked():
            say(describe(ledger.find(run).enter("failed", str(error))))
        return False
    return True


def _take_session(service: Service, run: str, gpu_sessions: int) -> bool:
    """Whether there is still one: the run is then about to be pushed."""
    with ledger.locked():
        entry = ledger.find(run)
        free = entry.state == "queued" and _in_use(service) < gpu_sessions
        if free:
            entry.enter("pushing")
    return free


def _push(service: Service, run: str, say: Say) -> Entry:
    entry = ledger.find(run)
    try:
        pushed = service.push(entry.push_folder, entry.session_seconds)
    except LimitReached as limit:
        _settle(run, "queued", str(limit))
        raise
    except Refused as refusal:
        if refusal.status in (401, 403):  # the account's trouble, not the run's
            _settle(run, "queued", str(refusal))
            raise
        entry = _settle(run, "failed", str(refusal))
    else:
        entry = _settle(run, "submitted", version=pushed.version, url=pushed.url)
        if pushed.missing:
            reason = f"no such sources, or no access to them: {', '.join(pushed.missing)}. Correct params/kaggle.yaml."
            with ledger.locked():
                entry = ledger.find(run)
                entry = entry.enter("failed", f"{reason} It was started all the same: stop it at {entry.url}")
    if entry.state == "failed":
        say(describe(entry))
    return entry


def _settle(run: str, state: Name, note: str = "", **changes) -> Entry:
    """What became of a push, unless another process has seen the run on the service meanwhile and knows better."""
    with ledger.locked():
        entry = ledger.find(run)
        return entry.enter(state, note, **changes) if entry.state == "pushing" else entry


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
