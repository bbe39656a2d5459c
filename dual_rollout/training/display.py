"""How a run is drawn: by rich where that is installed and stdout is a terminal, elsewhere as plain text.

Both ways show the same words and figures. `display_for_stdout` alone decides between them.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from tqdm import tqdm

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.progress import Progress

WIDTH = 80


class Display(Protocol):
    """What a run draws on."""

    def begin(self, done: int, steps: int) -> None:
        """Show the bar, of a run that has done some of its steps."""

    def advance(self, done: int) -> None:
        """Move the bar, if there is one, to the steps done."""

    def hide_bar(self) -> None:
        """Take the bar away for a while, before others write to the terminal."""

    def show_bar(self) -> None:
        """Draw the bar again, if there is one."""

    def end(self) -> None:
        """Take the bar away for good."""

    def heading(self, line: str) -> None:
        """A line above those of steps."""

    def line(self, line: str) -> None:
        """A line that stays, above the bar."""

    def alarm(self, text: str) -> None:
        """What is wrong, in words."""

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table: names in the first column, figures in the others. Nothing where there are no rows."""


def display_for_stdout() -> Display:
    """The display of this process."""
    if not sys.stdout.isatty():
        return PlainDisplay()
    try:
        from rich.console import Console as RichConsole
    except ImportError:
        return PlainDisplay()
    console = RichConsole(highlight=False)
    return PlainDisplay() if console.is_dumb_terminal else RichDisplay(console)


class PlainDisplay:
    """Lines on stdout and tqdm's bar on stderr."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] = tqdm(disable=True)  # which does nothing, as one that is closed

    def begin(self, done: int, steps: int) -> None:
        self._bar = tqdm(total=steps, initial=done, desc="training", unit="step", dynamic_ncols=True, leave=False)

    def advance(self, done: int) -> None:
        self._bar.update(done - self._bar.n)

    def hide_bar(self) -> None:
        self._bar.clear()

    def show_bar(self) -> None:
        self._bar.refresh()

    def end(self) -> None:
        self._bar.close()

    def heading(self, line: str) -> None:
        self.line(line)

    def line(self, line: str) -> None:
        tqdm.write(line, file=sys.stdout)  # above the bar
        sys.stdout.flush()

    def alarm(self, text: str) -> None:
        self.line(textwrap.fill(f"! {text}", WIDTH, subsequent_indent="  "))

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        print(plain_table(headings, rows))


class RichDisplay:
    """All of it on one console of rich, which keeps what `print` and `sys.stderr` are given above the bar."""

    def __init__(self, console: RichConsole):
        self._console = console
        self._bar: Progress | None = None

    def begin(self, done: int, steps: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

        columns = ("training", BarColumn(), MofNCompleteColumn(), "steps", TimeElapsedColumn(), TimeRemainingColumn())
        an_hour = 3600  # a step may take minutes, and by default only the last 30 s are used to guess what remains
        self._bar = Progress(
            *columns, console=self._console, transient=True, speed_estimate_period=an_hour, refresh_per_second=2
        )
        self._bar.add_task("training", total=steps, completed=done)
        self._bar.start()

    def advance(self, done: int) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done)

    def hide_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show_bar(self) -> None:
        if self._bar is not None:
            self._bar.start()

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def heading(self, line: str) -> None:
        self._console.print(line, style="bold", markup=False, soft_wrap=True)

    def line(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)

    def alarm(self, text: str) -> None:
        from rich.panel import Panel
        from rich.text import Text

        width = min(WIDTH, self._console.width)
        self._console.print(Panel(Text(text), title="alarm", title_align="left", border_style="yellow", width=width))

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        if not rows:
            return
        table = Table(*headings[:1], box=SIMPLE_HEAD)
        for heading in headings[1:]:
            table.add_column(heading, justify="right")
        for row in rows:
            table.add_row(*map(Text, row))
        self._console.print(table)


def plain_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in 24 columns and 10 for each figure, between empty lines; nothing where there are no rows."""
    if not rows:
        return ""
    lines = [f"{row[0]:24}" + "".join(f"{cell:>10}" for cell in row[1:]) for row in (headings, *rows)]
    return "\n".join(["", *lines, ""])
