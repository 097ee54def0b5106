"""Progress: what takes longer than a few seconds says what it does, how far it is and how long it will take.

On a terminal it is a bar that goes away; elsewhere (a log file, a job's output) a line now and then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

EVERY = 30.0
"""Seconds from one line to the next, where there is no terminal."""
T = TypeVar("T")


@contextmanager
def progress_bar(what: str, total: int | None, on: bool) -> Iterator[Callable[[float], None]]:
    """A bar; what is given is called with how much is done by now.

    Args:
        what: a word or two.
        total: how much there is to do; None if nobody knows.
        on: whether anything is shown.
    """
    if not on:
        yield lambda done: None
        return
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done: bar.update(task, completed=done)
        return
    begun = told = time.monotonic()

    def line(done: float) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= EVERY:
            told = now
            left = f", about {(now - begun) * (total - done) / max(done, 1e-9):.0f} s left" if total and done else ""
            console.print(f"{what}: {done:g}" + (f" of {total}" if total else "") + left, soft_wrap=True)

    yield line


def tracked(items: Iterable[T], what: str, total: int | None, on: bool) -> Iterator[T]:
    """The items, with a bar that counts them."""
    with progress_bar(what, total, on) as done:
        for number, item in enumerate(items, start=1):
            yield item
            done(number)


class LateBar:
    """A bar for what is seldom long: it shows only once that has taken some seconds. Used as a context.

    Args:
        what: a word or two.
        after: seconds.
    """

    def __init__(self, what: str, after: float = 5.0) -> None:
        self._what, self._after = what, after
        self._begun, self._done = time.monotonic(), 0
        self._open = ExitStack()
        self._show: Callable[[float], None] | None = None

    def __enter__(self) -> LateBar:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def step(self) -> None:
        """One more is done."""
        self._done += 1
        if self._show is None and time.monotonic() - self._begun > self._after:
            self._show = self._open.enter_context(progress_bar(self._what, None, on=True))
        if self._show is not None:
            self._show(self._done)


def length_of(data: object, most: int | None = None) -> int | None:
    """How many batches data has, or will be used; None if it does not say."""
    try:
        known: int | None = len(data)  # type: ignore[arg-type]
    except TypeError:
        known = None
    return known if most is None else most if known is None else min(known, most)
