"""How a run is drawn: rich and plain text show the same words and figures, and what is there decides which of them."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.cells import cell_len
from rich.console import Console as RichConsole

from dual_rollout.training.alarms import alarms
from dual_rollout.training.console import Console, heading_line
from dual_rollout.training.display import Display, PlainDisplay, RichDisplay, display_for_stdout
from dual_rollout.training.metrics_log import SUMMARY_HEADINGS, MetricsLog

ARGS = SimpleNamespace(disable_tqdm=False, log_completions=False)
STEP = {
    "reward": 0.512,
    "sampling/alpha/mean": 0.487,
    "sampling/effective_sample_size_ratio": 0.04,
    "sampling/importance_sampling_ratio/max": 2.134,
    "sampling/importance_sampling_ratio/min": 3.1e-12,
    "sampling/policy_drift/mean": 0.3,
    "rollout/tokens_per_second": 35.1,
    "perf/update_s": 9.8,
}


def show_a_run(display: Display, folder: Path) -> None:
    """Two steps and their evaluation, with two alarms, and the closing table."""
    console, log = Console(display), MetricsLog(folder)
    state = SimpleNamespace(global_step=0, max_steps=2, is_world_process_zero=True)
    console.on_train_begin(ARGS, state, None)
    for step, logs in ((1, STEP), (2, STEP), (2, {"eval_reward": 0.25, "eval_loss": 0.0})):
        state.global_step = step
        console.on_step_begin(ARGS, state, None)
        console.on_step_end(ARGS, state, None)
        for callback in (log, console):
            callback.on_log(ARGS, state, None, logs)
    console.on_train_end(ARGS, state, None)
    display.table(SUMMARY_HEADINGS, log.summary())


def drawn_by_rich(draw: Callable[[RichDisplay], None], terminal: bool) -> str:
    """On 80 columns; without `terminal` there is no bar and nothing moves the cursor."""
    file = io.StringIO()
    draw(RichDisplay(RichConsole(file=file, width=80, force_terminal=terminal, highlight=False)))
    return file.getvalue()


def words(text: str) -> list[str]:
    return re.sub("[│─╭╮╰╯]", " ", text).replace("alarm", "!").split()


def test_both_ways_show_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_a_run(PlainDisplay(), tmp_path)
    plain = capsys.readouterr().out
    rich = drawn_by_rich(lambda display: show_a_run(display, tmp_path / "rich"), terminal=False)
    assert len(alarms(STEP)) == plain.count("! ") == rich.count("alarm") == 2
    assert heading_line() in plain and "3.1e-12" in plain
    assert words(rich) == words(plain)
    for text in (plain, rich):
        assert max(map(cell_len, text.splitlines())) <= 80


def test_without_figures_there_is_no_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    PlainDisplay().table(SUMMARY_HEADINGS, MetricsLog(tmp_path).summary())
    rich = drawn_by_rich(lambda display: display.table(SUMMARY_HEADINGS, MetricsLog(tmp_path).summary()), terminal=True)
    assert capsys.readouterr().out.split() == rich.split() == []


def test_the_bar_stands_under_the_lines_and_goes_away() -> None:
    def draw(display: RichDisplay) -> None:
        display.advance(1)  # of no bar
        display.begin(5, 20)
        display.line("a line")
        print("said by another")
        display.hide_bar()
        display.show_bar()
        display.advance(7)
        display.end()
        display.end()

    text = drawn_by_rich(draw, terminal=True)
    plain = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", text)
    assert plain.index("5/20 steps") < plain.index("a line") < plain.rindex("7/20 steps")
    assert "said by another" in plain, "through the console, which draws the bar anew under it"
    assert max(map(cell_len, re.split(r"[\r\n]+", plain))) <= 80
    hidden, shown, cleared = "\x1b[?25l", "\x1b[?25h", "\x1b[2K"
    assert text.rindex(hidden) < text.rindex(shown), "the cursor is back"
    assert text.rindex(cleared) > text.rindex("7/20")


def test_the_bar_is_out_of_the_way_where_trl_prints_its_table_of_completions() -> None:
    """On a console of its own, of which ours knows nothing."""
    file = io.StringIO()
    console = Console(RichDisplay(RichConsole(file=file, width=80, force_terminal=True)))
    args = SimpleNamespace(disable_tqdm=False, log_completions=True)
    state = SimpleNamespace(global_step=0, max_steps=2, is_world_process_zero=True)
    console.on_train_begin(args, state, None)
    console.on_log(args, state, None, STEP)
    shown = file.getvalue()
    assert "0/2" in shown and shown.endswith("\x1b[2K"), "the last that was done is to clear the line"
    console.on_step_begin(args, state, None)
    assert "0/2" in file.getvalue()[len(shown) :]
    console.on_train_end(args, state, None)


@contextlib.contextmanager
def a_terminal_for_stdout(monkeypatch: pytest.MonkeyPatch, term: str = "xterm") -> Iterator[None]:
    monkeypatch.setenv("TERM", term)
    controller, terminal = os.openpty()
    with os.fdopen(terminal, "w") as stdout, contextlib.redirect_stdout(stdout):
        yield
    os.close(controller)


@pytest.mark.parametrize(("term", "expected"), [("xterm", RichDisplay), ("dumb", PlainDisplay)])
def test_a_terminal_that_can_move_its_cursor_is_drawn_on_by_rich(
    term: str, expected: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    with a_terminal_for_stdout(monkeypatch, term):
        assert isinstance(display_for_stdout(), expected)


def test_without_rich_a_terminal_gets_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.setitem(sys.modules, name, None)
    with a_terminal_for_stdout(monkeypatch):
        assert isinstance(display_for_stdout(), PlainDisplay)


def test_a_file_gets_plain_text_whatever_the_environment_says_of_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert isinstance(display_for_stdout(), PlainDisplay)
