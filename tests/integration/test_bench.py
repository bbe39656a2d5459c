"""`dual-rollout bench` on the embedded servers: every mode makes its row, and the files say what was printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dual_rollout.cli import main
from tests.integration.conftest import TinyPair

MODES = ["theta", "both", "naive", "lockstep", "block", "auto"]


def test_a_row_for_every_mode_and_load(tiny_pair: TinyPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    urls = ["--theta-url", tiny_pair.theta_url, "--t-url", tiny_pair.t_url]
    naive = ["--naive-urls", tiny_pair.theta_url, tiny_pair.t_url]
    load = ["--concurrency", "1", "3", "--context", "24", "--max-tokens", "6", "--top-k", "20"]
    assert main(["bench", *urls, *naive, *load, "--modes", *MODES, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [(row["mode"], row["concurrency"]) for row in rows] == [(mode, n) for n in (1, 3) for mode in MODES]
    for row in rows:
        assert row["tokens_per_second"] > 0 and row["first_token_s"] > 0
        assert f"{row['tokens_per_second']:.1f}" in printed
        base = next(r for r in rows if (r["mode"], r["concurrency"]) == ("both", row["concurrency"]))
        assert row["relative"]["both"] == pytest.approx(row["tokens_per_second"] / base["tokens_per_second"])
    requests = {row["mode"]: row["requests_per_token"] for row in rows if row["concurrency"] == 3}
    assert requests["both"] == pytest.approx(2 * 3 / 18)
    assert requests["naive"] == pytest.approx(2)
    assert requests["lockstep"] < requests["naive"]
    assert all((row["acceptance"] is not None) == (row["mode"] == "block") for row in rows if row["mode"] != "auto")
    assert (tmp_path / "bench.png").stat().st_size > 1000
