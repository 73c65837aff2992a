"""The progress bar of a run."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

WINDOW = 3600  # seconds of speed behind the ETA: shards of long and of short examples take turns


class ProgressBar:
    """A bar over tokens, with examples and tokens a second and the time left; a context manager.

    Args:
        total: tokens of all units.
        done: tokens of the units that an earlier run has finished; they do not count for the speed.
        shown: whether anything is drawn.
    """

    def __init__(self, total: int, done: int, *, shown: bool):
        columns = [TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()]
        columns += [TextColumn("{task.fields[speed]}"), TimeRemainingColumn()]
        self._bar = Progress(
            *columns, console=Console(stderr=True), disable=not shown, speed_estimate_period=WINDOW, transient=False
        )
        self._task = self._bar.add_task("base", total=total, completed=done, speed="")
        self._examples, self._tokens, self._start = 0, 0, time.monotonic()

    def __enter__(self) -> "ProgressBar":
        self._bar.start()
        self._start = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def describe(self, text: str) -> None:
        """Say what is being scored.

        Args:
            text: the task's name.
        """
        self._bar.update(self._task, description=text.replace("[", r"\["))  # rich reads [x] as markup

    def advance(self, examples: int, tokens: int) -> None:
        """Count scored examples.

        Args:
            examples: how many; negative where a unit starts again.
            tokens: their tokens.
        """
        self._examples += examples
        self._tokens += tokens
        seconds = max(time.monotonic() - self._start, 1e-9)
        speed = f"{self._examples / seconds:,.1f} examples/s {self._tokens / seconds:,.0f} tokens/s"
        self._bar.update(self._task, advance=tokens, speed=speed)
