"""What is printed: messages, and tables by rich, which the extra ``convnext-fast[demo]`` installs."""

from __future__ import annotations

import contextlib
import unicodedata
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

_UNPRINTED = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
"""Control and format characters (escapes, right-to-left marks), lone surrogates, and ends of lines and paragraphs."""

if TYPE_CHECKING:
    from rich.console import Console as Console
else:
    Console = "rich.console.Console"  # rich is optional, and imported where something is printed


def plain(text: str) -> str:
    """``text`` for a terminal: characters that move the cursor, hide or reorder text become escapes.

    Names of files and classes can hold anything. Line ends and tabs stay.
    """
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) in _UNPRINTED and c not in "\n\t" else c for c in text)


def how_to_install(extra: str) -> str:
    """The command that installs an extra of this package, for messages."""
    return f"pip install -e '.[{extra}]' in a clone of convnext_fast"


@contextlib.contextmanager
def needing(what: str, extra: str) -> Iterator[None]:
    """Within it, the ImportError of a missing package says ``what`` needs it, and how to install that extra."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{what} ({error}): {how_to_install(extra)}", name=error.name) from error


def new_console() -> Console:
    """Where to print, as wide as the terminal, ``COLUMNS``, or 80. Nothing is interpreted as markup.

    Raises:
        ImportError: rich is not installed.
    """
    with needing("tables need rich", "demo"):
        from rich.console import Console
    return Console(highlight=False, markup=False, emoji=False)


def print_table(
    console: Console, title: str, columns: Sequence[str] | None, rows: Sequence[Sequence[str]], total: bool = False
) -> None:
    """Print a table whose first column holds names; one that is wider than the console as one line per row.

    ``columns``: headings; None for rows of a name and a text. ``total``: the last row is the sum of the others.
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
