"""How far a long piece of work has come: a bar in a terminal, one line in a notebook, now and then a line in Kaggle's log."""

import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

FIRST_LOG_SECONDS, LOG_SECONDS = 10, 60  # at most 720 lines in a session of twelve hours


@contextmanager
def progress_bar(total: float, name: str, unit: str, shown: bool = True) -> Iterator[Callable[[float], object]]:
    """Yields ``advance(amount)``; ``unit`` is what is counted.

    In a notebook's kernel it is one display, updated in place, so that a saved notebook holds the last state alone. What
    people watch of a batch session on Kaggle is its log, where displays do not show: there a line is printed, too, after
    ten seconds and then every minute.
    """
    kind = _bar() if not _in_kernel() else _logged_line() if _in_kaggle_batch() else _line()
    with kind(
        total=total, desc=name, unit=unit, unit_scale=True, disable=not shown, mininterval=0.5, miniters=1
    ) as bar:
        # Shares of layers add up past the total by rounding.
        yield lambda amount: bar.update(min(amount, total - bar.n))


def _in_kernel() -> bool:
    ipython = sys.modules.get("IPython")  # a kernel has loaded it
    shell = ipython and ipython.get_ipython()
    return hasattr(shell, "kernel")


def _in_kaggle_batch() -> bool:
    return os.environ.get("KAGGLE_KERNEL_RUN_TYPE") == "Batch"


def _bar() -> type:
    from tqdm import tqdm

    return tqdm


@cache
def _line() -> type:
    from IPython.display import display
    from tqdm import tqdm

    class Line(tqdm):
        """One display of plain text."""

        monitor_interval = 0  # no thread that draws, too: a display belongs to the cell that is running

        def __init__(self, **options):
            self.handle = None
            super().__init__(file=io.StringIO(), **options)  # all that a terminal would get

        def display(self, msg=None, pos=None) -> None:
            content = {"text/plain": self.text()}
            if self.handle is None:
                self.handle = display(content, raw=True, display_id=True)
            else:
                self.handle.update(content, raw=True)

        def text(self) -> str:
            state = self.format_dict
            done, seconds = state["n"], state["elapsed"]
            share = done / self.total if self.total else 1.0
            rate = self._amount(done / seconds) if seconds else "-"
            return f"{self.desc}: {share:.0%} · {self._amount(done)} · {seconds:.1f} s · {rate}/s"

        def _amount(self, number: float) -> str:
            return self.format_sizeof(number, "B") if self.unit == "B" else f"{number:,.0f} {self.unit}"

    return Line


@cache
def _logged_line() -> type:
    class LoggedLine(_line()):
        """The same, and a printed line now and then."""

        def __init__(self, **options):
            self.next_log = time.monotonic() + FIRST_LOG_SECONDS
            super().__init__(**options)

        def display(self, msg=None, pos=None) -> None:
            super().display()
            if time.monotonic() >= self.next_log:
                self.next_log = time.monotonic() + LOG_SECONDS
                print(self.text(), flush=True)

    return LoggedLine
