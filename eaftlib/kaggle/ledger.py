"""The ledger: ``kaggle_runs/<run>/run.json`` says what was pushed, what became of it, and when."""

from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, Field, ValidationError

from ..errors import KaggleError
from ..files import read_json, write_json
from . import states

SCHEMA = "eaft-kaggle-run/1"
LEDGER = "run.json"
ROOT = Path("kaggle_runs")


class Busy(KaggleError):
    """Another process is at this run."""


class Step(BaseModel):
    """A state, the time that the run entered it (UTC, ISO 8601), and why."""

    state: states.Name
    at: str
    note: str = ""


class Session(BaseModel):
    """What came of an attempt that did not end the run.

    finished: how much of the work its files hold, in the notebook's unit. journal_bytes: of what a pass has noted that is
    not finished. progress: whether that is more than what it began with. next_from: the attempt whose files another
    session goes on from, if any has left some.
    """

    attempt: int
    finished: int
    journal_bytes: int
    progress: bool
    next_from: int | None


class Entry(BaseModel):
    """One run. ``attempt`` counts pushes that were meant; ``version`` is the kernel's, once the service has said it."""

    schema_: Annotated[Literal[SCHEMA], Field(alias="schema")] = SCHEMA
    run: str
    notebook: str
    params_file: str
    params: dict[str, Any]
    params_sha256: str
    code_sha256: str
    commit: str
    ref: str
    session_seconds: int
    attempt: int = 1
    version: int | None = None
    url: str | None = None
    steps: list[Step]
    unknown_since: datetime | None = None  # since when the service has denied that there is such a kernel
    sessions: list[Session] = []
    results: dict[str, str] = {}

    @property
    def state(self) -> states.Name:
        return self.steps[-1].state

    @property
    def active(self) -> bool:
        """Whether it may hold a GPU session."""
        return self.state in states.ACTIVE

    @property
    def push_folder(self) -> Path:
        """What the present attempt pushes."""
        return folder(self.run) / f"push-{self.attempt}"

    @property
    def result_folder(self) -> Path:
        return folder(self.run) / "result"

    def left_folder(self, attempt: int) -> Path:
        """What came of an attempt whose results were not verified."""
        return folder(self.run) / f"left-{attempt}"

    @property
    def session_before(self) -> Session | None:
        """What the present attempt began with."""
        return next((s for s in reversed(self.sessions) if s.attempt < self.attempt), None)

    @property
    def owner(self) -> str:
        return self.ref.split("/")[0]

    @property
    def submitted_at(self) -> datetime | None:
        """When the present attempt was last about to be submitted."""
        pushing = (step.at for step in reversed(self.steps) if step.state == "pushing")
        return next(map(datetime.fromisoformat, pushing), None)

    @property
    def age(self) -> timedelta:
        """How long ago that was."""
        return datetime.now(UTC) - self.submitted_at

    @property
    def running_since(self) -> datetime | None:
        """When the present attempt was first seen running."""
        at = None
        for step in self.steps:
            if step.state == "pushing":
                at = None
            elif step.state == "running" and at is None:
                at = datetime.fromisoformat(step.at)
        return at

    @property
    def since(self) -> datetime:
        return datetime.fromisoformat(self.steps[-1].at)

    def require_owner(self, owner: str) -> None:
        if self.owner != owner:
            raise KaggleError(f"{self.run} is a run of {self.owner}, and the credentials are of {owner}: use those")

    def enter(self, state: states.Name, note: str = "", **changes: Any) -> "Entry":
        """Record a new state, atomically, and return the new entry. To and fro is kept once, however often it happens.

        Raises KaggleError where the table of states has no way there.
        """
        before = self.state if self.steps else states.NEW
        if state not in (then := states.STATES[before].then):
            raise KaggleError(f"{self.run} is {before}; it cannot become {state!r}, only one of {list(then)}")
        steps = [*self.steps, Step(state=state, at=datetime.now(UTC).isoformat(timespec="seconds"), note=note)]
        if len(steps) > 4 and [(s.state, s.note) for s in steps[-2:]] == [(s.state, s.note) for s in steps[-4:-2]]:
            steps[-4:-2] = []
        entry = self.model_copy(update={"steps": steps, **changes})
        save(entry)
        return entry


def folder(run: str) -> Path:
    return ROOT / run


def save(entry: Entry) -> None:
    write_json(folder(entry.run) / LEDGER, entry.model_dump(mode="json", by_alias=True))


def find(run: str) -> Entry | None:
    path = folder(run) / LEDGER
    if not path.is_file():
        return None
    try:
        entry = Entry.model_validate(read_json(path, KaggleError, "restore it, or remove the run's folder"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise KaggleError(
            f"{path} is no ledger of a run: {where}: {first['msg']}. Restore it, or remove the folder."
        ) from None
    if entry.run != run:
        raise KaggleError(
            f"{path} is of the run {entry.run}: a run keeps its folder's name, and a copy lives elsewhere"
        )
    return entry


def owned_by(owner: str) -> list[Entry]:
    """An account's runs, oldest first."""
    return [entry for entry in entries() if entry.owner == owner]


def entries() -> list[Entry]:
    """Every run, oldest first."""
    found = [find(path.parent.name) for path in ROOT.glob(f"*/{LEDGER}")]
    return sorted(found, key=lambda entry: (entry.steps[0].at, entry.run))


@contextmanager
def locked(run: str = "", seconds: float = 600):
    """One process at a time; the lock goes with its process, however that ends.

    Without ``run``: for a decision and the writing of it. With: for what takes long with one run, its upload or download;
    the first lock may be taken within the second. Raises KaggleError, or Busy of a run.
    """
    file = ROOT / run / ".lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(file, timeout=seconds):
            yield
    except Timeout:
        if run:
            raise Busy(f"another process is at {run}") from None
        raise KaggleError(f"another process has held {file} for {seconds:.0f} s; let it end, then repeat") from None
