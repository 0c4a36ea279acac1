"""How far a long piece of work has come."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(total: float, name: str, unit: str, shown: bool = True) -> Iterator[Callable[[float], object]]:
    """Yields ``advance(amount)``."""
    from tqdm import tqdm

    with tqdm(total=total, desc=name, unit=unit, unit_scale=True, disable=not shown, mininterval=0.5) as bar:
        # Shares of layers add up past the total by rounding.
        yield lambda amount: bar.update(min(amount, total - bar.n))
