"""Tables and progress bars, on rich, which the extra ``convnext-fast[demo]`` installs."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .files import how_to_install

_UNPRINTED = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
"""Control and format characters (escapes, right-to-left marks), lone surrogates, and ends of lines and paragraphs."""

if TYPE_CHECKING:
    from rich.console import Console


def plain(text: str) -> str:
    """``text`` for a terminal: characters that would move its cursor, hide or reorder text are written as escapes.

    Names of files and classes come from elsewhere, and may hold anything. Line ends and tabs stay.
    """
    return "".join(_escaped(c) if unicodedata.category(c) in _UNPRINTED and c not in "\n\t" else c for c in text)


def _escaped(character: str) -> str:
    return ascii(character)[1:-1]


def new_console() -> Console:
    """Where to print; as wide as the terminal, ``COLUMNS``, or 80. Nothing that is printed is read as markup.

    Raises:
        ImportError: rich is not installed.
    """
    try:
        from rich.console import Console
    except ImportError as error:
        raise ImportError(f"tables need rich ({error}): {how_to_install('demo')}") from error
    return Console(highlight=False, markup=False, emoji=False)


def print_table(
    console: Console, title: str, columns: Sequence[str] | None, rows: Sequence[Sequence[str]], total: bool = False
) -> None:
    """Print a table whose first column holds names; where it is wider than the console, a line for each row instead.

    Args:
        console: where to print.
        title: printed above.
        columns: headings; None for rows of a name and a text.
        rows: one cell for each column.
        total: the last row sums up the others, and is set apart.
    """
    from rich import box
    from rich.measure import Measurement
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD if columns else None, show_header=columns is not None)
    for i, column in enumerate(columns or ("", "")):
        table.add_column(column, justify="right" if i and columns else "left", no_wrap=True)
    for i, row in enumerate(rows):
        table.add_row(*map(plain, row), end_section=total and i == len(rows) - 2)
    console.print(plain(title), style="bold", soft_wrap=True)
    wide = console.options.update(max_width=10_000)
    if Measurement.get(console, wide, table).maximum <= console.width:
        console.print(table)
        return
    for name, *cells in rows:
        words = cells if columns is None else [f"{c} {w}" for c, w in zip(columns[1:], cells, strict=True) if w]
        console.print(plain(f"{name}: {', '.join(words)}"))


class TrainingProgress:
    """Shows a training run: a bar on a terminal, and a line for each epoch anywhere."""

    def __init__(self, console: Console):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = console
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def start(self, step: int, steps: int) -> None:
        """See `training.Reporter`."""
        self.task = self.progress.add_task("", total=steps, completed=step, loss=float("nan"))
        self.progress.start()
        if step:
            self.console.print(f"resumed at step {step} of {steps}")

    def step(self, step: int, loss: float, lr: float) -> None:
        """See `training.Reporter`."""
        self.progress.update(self.task, completed=step + 1, loss=loss)

    def epoch(self, record: dict[str, Any]) -> None:
        """See `training.Reporter`."""
        words = [f"epoch {record['epoch']}", f"loss {record['loss']:.4f}"]
        if "accuracy" in record:
            words += [f"validation loss {record['validation_loss']:.4f}", f"accuracy {record['accuracy']:.2%}"]
        words += [f"lr {record['lr']:.2e}", f"{record['images_per_second']:.0f} images/s"]
        self.console.print("  ".join(words), soft_wrap=True)

    def warn(self, text: str) -> None:
        """See `training.Reporter`."""
        self.console.print(plain(f"note: {text}"), soft_wrap=True)

    def stop(self) -> None:
        """Take the bar away."""
        self.progress.stop()


class Silence:
    """A `training.Reporter` for the processes that are not the first: it only warns, on standard error."""

    def start(self, step: int, steps: int) -> None:
        """Say nothing."""

    def step(self, step: int, loss: float, lr: float) -> None:
        """Say nothing."""

    def epoch(self, record: dict[str, Any]) -> None:
        """Say nothing."""

    def warn(self, text: str) -> None:
        """Say what was skipped."""
        print(plain(f"note: {text}"), file=sys.stderr)

    def stop(self) -> None:
        """Say nothing."""
