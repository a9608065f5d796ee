"""How work shows that it goes on, a bar on a terminal and plain lines in a file or a batch job's log; what it says."""

import datetime
import time
from typing import Any

import rich.progress
from rich.console import Console
from rich.text import Text

_EVERY_S = 30.0  # seconds between two lines


def say(words: str | Text) -> None:
    """Tells the user a line on standard error, as it is: nothing in it is markup, and it is not wrapped."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(words if isinstance(words, Text) else Text(words))


def warn(console: Console, words: str) -> None:
    """Tells a line that a person should look at, as it is; on a console that may be quiet."""
    console.print(words, style="yellow", markup=False, highlight=False, soft_wrap=True)


class Progress(rich.progress.Progress):
    """rich's bars; where no terminal shows them, a line every half minute and one at the end of each task."""

    def __init__(self, *columns: rich.progress.ProgressColumn, console: Console, **options: Any):
        super().__init__(*columns, console=console, disable=not console.is_terminal, **options)
        self._last_line = time.monotonic()

    def update(self, task_id: rich.progress.TaskID, **changes: Any) -> None:  # type: ignore[override]
        """As in rich."""
        super().update(task_id, **changes)
        task, now = self._tasks[task_id], time.monotonic()
        if self.console.is_terminal or not (task.finished or now - self._last_line >= _EVERY_S):
            return
        self._last_line = now
        notes = [str(value) for value in task.fields.values() if value]
        words = [f"{task.description} {task.completed:.0f}/{task.total:.0f}", *notes]
        if not task.finished and task.time_remaining is not None:
            words.append(f"{datetime.timedelta(seconds=round(task.time_remaining))} left")
        self.console.print("  ".join(words), markup=False, highlight=False, soft_wrap=True)
