"""What commands print fits 80 columns, with figures as large as they come."""

from __future__ import annotations

import pytest

from dual_rollout.benchmark import BASES, MODES, Row
from dual_rollout.cli.bench import _HEADER, _line, _ratios
from dual_rollout.cli.doctor import render
from dual_rollout.decoding.tuner import Choice
from dual_rollout.samplers.examination import Check, Examination


def bench_row(mode: str) -> Row:
    chosen = str(Choice("block", 2, 16, "prompt_logprobs")) if mode == "auto" else None
    relative = {base: 0.5 if base == "both" else 1234.56 for base in BASES}
    return Row(mode, 1024, 131072, 12307.6, 12.345, 9876.5, 0.91, 12.345, 123456.0, chosen, relative)


def test_the_tables_of_bench() -> None:
    rows = [bench_row(mode) for mode in MODES]
    table = _ratios(rows).splitlines()
    lines = [_HEADER, *(line for row in rows for line in _line(row).splitlines()), *table]
    assert max(map(len, lines)) <= 80
    assert [line.split() for line in (_HEADER, _line(rows[0]))] == [
        ["mode", "conc.", "context", "tok/s", "req/tok", "KB/tok", "accept", "first", "s", "CPU", "µs"],
        ["theta", "1024", "131072", "12307.6", "12.345", "9876.5", "0.91", "12.345", "123456"],
    ], "no two cells touch"
    upper, lower, first = table[2:5]
    assert (upper.split(), lower.split()[3:]) == (
        ["native", "pairs"],
        ["both", "t", "lockstep", "naive", *2 * ["plain"]],
    )
    assert first.split() == ["theta", "1024", "131072", "0.50", *5 * ["1234.56"]]
    assert (
        lower.endswith("plain") and len(lower) == len(first) and upper.index("native") + 6 == lower.index("plain") + 5
    )
    assert _ratios([Row("block", 4, 64, 1.0, 1.0, 1.0, None, 0.1, 1.0, None)]) == ""


@pytest.mark.parametrize("status", ["ok", "failed", "optional"])
def test_the_report_of_doctor(status: str) -> None:
    """But for what may not be broken, an address or a flag that is itself longer."""
    detail = "Qwen/Qwen2.5-7B-Instruct at http://127.0.0.1:8001, version 0.32.1.dev123+g0123456789.d20261128, and " * 3
    checks = [
        Check(server, "token-in/token-out", status, detail, "set " + 9 * "--max-logprobs 100 ")
        for server in ("π_θ", "both")
    ]
    said = {"version": "0.32.1.dev123+g0123456789.d20261128.precompiled"}
    printed = render(Examination({"π_θ": said, "π_t": None}, checks))
    assert max(map(len, printed.splitlines())) <= 80
    assert printed.count("→") == 2 and " ".join(printed.split()).count("--max-logprobs 100") == 18
