"""The progress bar of a long run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn


@contextmanager
def progress_bar(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """One bar for the step at hand, with the time since the start; gone when the work is done.

    Gives `update(description, completed, total)`; a new description starts the bar anew.
    """
    started = time.monotonic()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[elapsed]}", style="dim"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("starting", total=None, elapsed="")

        def update(description: str, completed: int, total: int) -> None:
            elapsed = int(time.monotonic() - started)
            clock = f"{elapsed // 60}:{elapsed % 60:02d}"
            progress.update(bar, description=description, completed=completed, total=total, elapsed=clock)

        yield update
