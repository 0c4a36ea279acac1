"""Progress that leaves one line: a bar in a terminal, one display in a notebook, a line a minute in Kaggle's log."""

import functools
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm  # transformers brings it along

SECONDS_BETWEEN_UPDATES = 0.5
SECONDS_BETWEEN_LINES = 60


@contextmanager
def progress_bar(total: int, name: str, unit: str, shown: bool = True) -> Iterator[Callable[[float], None]]:
    """Yield ``advance(amount)``, which shows how much of ``total`` is done, never more than all of it.

    unit: what is counted; bytes ("B") are shown as kB, MB, GB. In a notebook the last state stays in the saved file, one
    line of plain text, also where the body raises. In a Kaggle session that runs on its own, the log is what people
    watch: it gets a line at the start, one a minute, and the last state, and the notebook no display besides.
    """
    with _bar_for_here()(total=total, desc=name, unit=unit, unit_scale=True, disable=not shown) as bar:
        yield lambda amount: bar.update(min(amount, total - bar.n))


class _Line(tqdm):
    """A bar whose state is one line of text, given to ``show``."""

    monitor_interval = 0  # no thread that refreshes: what it shows would belong to no cell

    def __init__(self, show: Callable[[str], None], **settings):
        self.show = show
        super().__init__(file=io.StringIO(), miniters=1, **settings)  # the file takes the line feeds of a bar

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        elapsed = self.format_dict["elapsed"]
        percent = 100 * round(self.n) // self.total if self.total else 100  # shares of layers fall short by rounding
        rate = self.n / elapsed if elapsed else 0
        amount, speed = _amount(self.n, self.unit), _amount(rate, self.unit)
        self.show(f"{self.desc}: {percent} % · {amount} · {elapsed:,.1f} s · {speed}/s")


def _amount(number: float, unit: str) -> str:
    return f"{tqdm.format_sizeof(number)}B" if unit == "B" else f"{number:,.0f} {unit}"


def _bar_for_here() -> Callable[..., tqdm]:
    if os.environ.get("KAGGLE_KERNEL_RUN_TYPE") == "Batch":
        return functools.partial(_Line, functools.partial(print, flush=True), mininterval=SECONDS_BETWEEN_LINES)
    bar = functools.partial(_Line, _in_place()) if _in_kernel() else tqdm
    return functools.partial(bar, mininterval=SECONDS_BETWEEN_UPDATES)


def _in_kernel() -> bool:
    """Whether this runs in a notebook's kernel; a terminal's IPython has none."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def _in_place() -> Callable[[str], None]:
    """Show a line in the cell's output; each further one replaces it, there and in the saved notebook."""
    from IPython.display import display

    handle = None

    def show(line: str) -> None:
        nonlocal handle
        if handle is None:
            handle = display({"text/plain": line}, raw=True, display_id=True)
        else:
            handle.update({"text/plain": line}, raw=True)

    return show
