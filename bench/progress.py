"""Where a run stands: a bar if rich is installed and someone looks, else a line per case."""

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def tracked(items: Sequence[T]) -> Iterator[tuple[Iterator[T], Callable[[str], None]]]:
    """An iterator over `items` that shows how far it is, and a function that prints a line."""
    if importlib.util.find_spec("rich") is None or not sys.stdout.isatty():
        yield iter(items), lambda line: print(line, flush=True)
        return
    from rich.progress import Progress, TimeElapsedColumn

    # its refresh thread would disturb what is measured
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), auto_refresh=False) as bar:
        yield iter(bar.track(items, description="cases")), lambda line: bar.console.print(line, highlight=False, markup=False)
