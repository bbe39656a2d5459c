"""The ratios that `dual-rollout bench` reports."""

from __future__ import annotations

import pytest

from dual_rollout.benchmark import Row, summarise
from dual_rollout.cli import main


def row(mode: str, speed: float) -> Row:
    return Row(mode, 4, 64, speed, 1.0, 1.0, None, 0.1, 100.0, None)


def test_ratios_are_taken_within_a_turn() -> None:
    """A machine that slows down to a tenth in the second turn changes no ratio."""
    turns = [[row("both", speed), row("naive", 0.1 * speed), row("native", 0.9 * speed)] for speed in (100, 10, 80)]
    both, naive, native = summarise(turns)
    assert (both.tokens_per_second, naive.tokens_per_second, native.tokens_per_second) == pytest.approx((80, 8, 72))
    assert native.relative == pytest.approx({"both": 0.9, "naive": 9.0})
    assert list(native.relative) == ["both", "naive"], "only of what was measured"


def test_the_median_of_the_ratios_is_not_the_ratio_of_the_medians() -> None:
    turns = [[row("t", t), row("auto", auto)] for t, auto in ((10, 5), (20, 20), (40, 8))]
    assert summarise(turns)[1].relative["t"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--theta-url", "http://a"], "--t-url"),
        ([], "--theta-model"),
        (["--theta-model", "m", "--modes", "fast"], "fast"),
        (["--theta-model", "m", "--modes", "native"], "--native-url"),
        (["--theta-model", "m", "--repeat", "0"], "--repeat"),
    ],
)
def test_bad_flags_are_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *flags]) == 2
    assert message in capsys.readouterr().err
