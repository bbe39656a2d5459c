"""`dual-rollout bench` on the embedded servers: every mode makes its row, and the files say what was printed."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from aiohttp import web

from dual_rollout import CoordinatorConfig
from dual_rollout.benchmark import Benchmark
from dual_rollout.cli import main
from tests.fault_proxy import Exchange, FaultProxy, passed_on
from tests.hang import HANG
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


def test_both_contexts_of_all_sequences_are_generated_at_once(tiny_pair: TinyPair):
    """What pairs are compared with: two requests of each of three sequences are open, which the answers wait for."""

    async def wait_for_all(exchange: Exchange) -> web.StreamResponse:
        while proxy.most_open < 6:
            await asyncio.sleep(0.01)
        return await passed_on(exchange)

    async def run() -> None:
        async with proxy.running():
            config = CoordinatorConfig(theta_url=proxy.url, t_url=proxy.url)
            benchmark = Benchmark(config, native_url=proxy.url, max_tokens=2)
            assert (await benchmark.run("pairs_plain", 3, 16)).requests_per_token == pytest.approx(6 / 6)

    proxy = FaultProxy(tiny_pair.theta_url, wait_for_all)
    asyncio.run(asyncio.wait_for(run(), HANG))
