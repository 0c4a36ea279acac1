"""Run variants side by side in one process, print a table of medians and ratios, keep it in bench/results/."""

import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from eaftlib import project

ROOT = Path(__file__).parents[1]
REPEATS = 5


def side_by_side(
    name: str, runs: dict[str, Callable], amount: float, unit: str, repeats: int = REPEATS, inner: int = 1
) -> list[dict]:
    """Every variant once per round after one warm-up, so that drift hits all alike; ratios are to the first.

    amount / seconds is reported in ``unit``; each timing covers ``inner`` calls. On a GPU the peak memory beyond what was
    there before is kept.
    """
    peaks = {label: warm_up(run) for label, run in runs.items()}
    seconds = {label: [] for label in runs}
    for _ in range(repeats):
        for label, run in runs.items():
            started = now()
            for _ in range(inner):
                run()
            seconds[label].append((now() - started) / inner)
    first = statistics.median(next(iter(seconds.values())))
    return [
        {
            "comparison": name,
            "variant": label,
            "median": amount / statistics.median(times),
            "low": amount / max(times),
            "high": amount / min(times),
            "unit": unit,
            "ratio": first / statistics.median(times),
            "peak_gb": peaks[label],
        }
        for label, times in seconds.items()
    ]


def warm_up(run: Callable) -> float | None:
    if not torch.cuda.is_available():
        run()
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def print_table(rows: list[dict]) -> None:
    last = None
    for row in rows:
        if row["comparison"] != last:
            print(f"\n{row['comparison']}")
        last = row["comparison"]
        spread = f"[{row['low']:,.0f}, {row['high']:,.0f}]" if "low" in row else ""
        memory = f"{row['peak_gb']:.2f} GB" if row.get("peak_gb") is not None else ""
        print(
            f"  {row['variant']:<44}{row['median']:>11,.0f} {row['unit']:<9}{row['ratio']:>6.2f}x {memory:>9}  {spread}"
        )


def save(rows: list[dict], folder: Path, suffix: str = "", **more) -> Path:
    """Write DATE-DEVICE<suffix>.json with device, versions and commit."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if torch.cuda.is_available():
        import triton

        versions |= {"triton": triton.__version__, "cuda": torch.version.cuda}
    date = datetime.date.today().isoformat()
    content = {
        "date": date,
        "device": device_name(),
        "commit": project.commit(ROOT),
        "versions": versions,
        "rows": rows,
    }
    kind = "".join(c if c.isalnum() else "-" for c in device_name().split(",")[0])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{date}-{kind}{suffix}.json"
    path.write_text(json.dumps(content | more, indent=1) + "\n")
    return path
