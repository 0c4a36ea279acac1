"""What a run will take, said before it is pushed: tokens, hours, sessions, and its share of the week's quota."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ResultError
from . import build, ledger, outcome
from .build import Plan, Settings
from .following import Say
from .job import JOBS
from .ledger import Entry
from .service import Refused, Service, Unreachable

SET_UP_HOURS = 0.15  # of a session: packages, and reading 14 GB of weights. Assumed
# Computed speeds count kernels alone, by data sheets. On the H100 a pass within 15 GB took 131,072 / 25,098 = 5.2 s for 3.3 s
# of kernels where these were profiled (docs/speed.md, "As Kaggle's T4 runs it"): 1.6 times as long.
_OVERHEAD = 1.6
_MEASURED = "measured with gpt-oss-20b"


@dataclass(frozen=True)
class Speed:
    """Tokens a second of one GPU at gpt-oss-20b's shape."""

    tokens_per_second: float
    how: str


@dataclass(frozen=True)
class Accelerator:
    """What Kaggle calls by one name: ``cards`` GPUs with ``gpu`` in their names. One H100 more was 1.97 times as fast."""

    gpu: str
    cards: int
    scoring: Speed
    training: Speed


def _computed(tokens_per_second: float) -> Speed:
    return Speed(tokens_per_second, "computed for gpt-oss-20b")


# Training: docs/gpu.md, "Recovery: memory and hours". Scoring by a T4: docs/speed.md, "As Kaggle's T4 runs it". By an A100 (312
# TFLOP/s, 40 GB: layers streamed) and an L4 (121 TFLOP/s, 300 GB/s: the lesser share): of the 47,612 tokens/s that an H100 made
# within 16 GB (990 TFLOP/s, 3,350 GB/s).
ACCELERATORS = {
    "NvidiaTeslaT4": Accelerator("T4", 2, _computed(2_400 / _OVERHEAD), _computed(320 / 2)),
    "NvidiaL4X1": Accelerator("L4", 1, _computed(47_612 * 300 / 3_350 / _OVERHEAD), _computed(1_000)),
    "NvidiaL4": Accelerator("L4", 4, _computed(47_612 * 300 / 3_350 / _OVERHEAD), _computed(1_000)),
    "NvidiaTeslaA100": Accelerator("A100", 1, _computed(47_612 * 312 / 990 / _OVERHEAD), _computed(2_800)),
    "NvidiaH100": Accelerator("H100", 1, Speed(68_000, _MEASURED), Speed(11_202, _MEASURED)),
}


@dataclass(frozen=True)
class Forecast:
    tokens: int
    speed: Speed  # of a whole session's GPUs
    hours: float
    sessions: int


def announce(plans: Sequence[Plan], settings: Settings, service: Service, say: Say) -> None:
    """Say what each run will take, and what all will of what is left of the week's quota."""
    hours = 0.0
    for plan in plans:
        if not JOBS[plan.notebook].gpu:
            say(f"{plan.run}  takes no GPU hours: it copies bytes")
            continue
        found = forecast(plan.notebook, plan.parameters, settings, ledger.owned_by(service.owner))
        if isinstance(found, str):
            say(f"{plan.run}  how long it takes is not known: {found}")
            continue
        hours += found.hours
        say(
            f"{plan.run}  {found.tokens:,} tokens at {found.speed.tokens_per_second:,.0f} tokens/s ({found.speed.how}) of "
            f"{settings.accelerator}: {found.hours:.1f} h, {found.sessions} session(s)"
        )
    if hours:
        say(f"{hours:.1f} GPU hours in all; {_of_the_quota(hours, service)}")


def forecast(notebook: str, parameters: dict[str, Any], settings: Settings, entries: Sequence[Entry]) -> Forecast | str:
    """Of one run, or why there is none. entries: runs whose finished ones say how fast they really were."""
    job, accelerator = JOBS[notebook], ACCELERATORS.get(settings.accelerator)
    if accelerator is None:
        return f"no speed of {settings.accelerator}; there is one of {', '.join(ACCELERATORS)}"
    tokens = job.tokens(parameters)
    if tokens is None:
        return "how many packs it scores is known only there; name them (pack_files, or only)"
    by_sheet = accelerator.training if job.trains else accelerator.scoring
    speed = _of_finished(notebook, parameters["model"], settings, accelerator, entries)
    speed = speed or Speed(by_sheet.tokens_per_second * accelerator.cards, by_sheet.how)
    working = tokens / speed.tokens_per_second / 3600
    a_session = settings.session_hours - build.FINISHING_SECONDS / 3600 - SET_UP_HOURS
    sessions = math.ceil(working / a_session)
    return Forecast(tokens, speed, working + sessions * SET_UP_HOURS, sessions)


def _of_finished(
    notebook: str, model: str, settings: Settings, accelerator: Accelerator, entries: Sequence[Entry]
) -> Speed | None:
    """What verified runs of the model on that accelerator made in all, by the time that they took for it."""
    tokens = seconds = 0.0
    for entry in entries:
        job = JOBS[entry.notebook]
        alike = job.trains == JOBS[notebook].trains and entry.params["model"] == model
        if entry.state != "verified" or not alike or not _ran_on(entry, settings.accelerator, accelerator):
            continue
        for made, speed in job.speeds(entry.result_folder):
            tokens, seconds = tokens + made, seconds + made / speed
    return Speed(tokens / seconds, "of finished runs") if seconds else None


def _ran_on(entry: Entry, name: str, accelerator: Accelerator) -> bool:
    """It was pushed for that accelerator, and the session found its cards, all of them."""
    try:
        gpus = outcome.read(entry.result_folder).machine.get("gpus", [])
    except ResultError:  # the results were taken away
        return False
    asked = json.loads((entry.push_folder / build.METADATA_FILE).read_text())["machine_shape"]
    return asked == name and len(gpus) == accelerator.cards and all(accelerator.gpu in gpu for gpu in gpus)


def _of_the_quota(hours: float, service: Service) -> str:
    try:
        quota = service.quota()
    except (Unreachable, Refused) as error:
        return f"what is left is not known ({error})"
    if quota is None:
        return "Kaggle does not say how many are left"
    share = f"{100 * hours / quota.total:.0f} % of the week's {quota.total:.0f}, of which {quota.left:.1f} are left"
    return share + (": it waits for the next week's" if hours > quota.left else "")
