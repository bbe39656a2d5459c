"""Draws from q* in torch: their distribution, their numbers, the random numbers, and which rows of a step are pairs."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from dual_rollout.config import AlphaRule
from dual_rollout.functional import entropy_alpha, ess_balance_alpha, kl_budget_alpha
from dual_rollout.functional.kl_symmetry import solve_alpha
from dual_rollout.native import table as table_module
from dual_rollout.native.draw import FORCED, DrawInPlace, compiled_draw, draw, exponential, pack, unpack
from dual_rollout.native.table import PAGE, DrawnRollout, RowTable
from dual_rollout.native.wire import NUMBERS, Member, Side
from tests.chi_square import chi_square_p_value

VOCAB = 60
BALANCED = AlphaRule()


def logits_of(rows: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return 2.0 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def member(rollout: str = "a", side: Side = "theta", **values: Any) -> Member:
    defaults = {"seed": 3, "start": 0, "mark": 59, "rule": BALANCED, "temperature": 1.0}
    return Member(rollout=rollout, side=side, **(defaults | values))


def columns(count: int, rows: Any = None, seeds: Any = None, **lists: Any) -> torch.Tensor:
    values = {"positions": [0] * count, "cells": range(count)} | lists
    members = [member(seed=seed) for seed in seeds or range(count)]
    return torch.from_numpy(pack(rows=rows or [(0, 1)] * count, members=members, **values))


def distribution(logits: torch.Tensor, alpha: float, temperature: float = 1.0) -> np.ndarray:
    logp = (logits.double() / temperature).log_softmax(1)
    return ((1 - alpha) * logp[0] + alpha * logp[1]).softmax(0).numpy()


@pytest.mark.parametrize("seeds_differ", [True, False], ids=["seeds", "positions"])
def test_draws_follow_the_distribution(seeds_differ: bool) -> None:
    """Of 20,000 seeds, and of 20,000 positions. Chi-square, false alarm one in 10,000 each."""
    count, logits = 20_000, logits_of(2)
    lists = {} if seeds_differ else {"seeds": [7] * count, "positions": range(count)}
    tokens, numbers = draw(logits, logits, unpack(columns(count, **lists)))
    expected = distribution(logits, float(numbers[0, 1]))
    assert chi_square_p_value(np.bincount(tokens, minlength=VOCAB), count * expected) > 1e-4


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1])
def test_random_numbers_are_exponential_and_independent(seed: int) -> None:
    """Over tokens, over positions, and neighbours in both. Chi-square in 50 cells, false alarm one in 10,000 each."""
    positions = columns(400, seeds=[seed] * 400, positions=range(400))
    uniform = 1 - np.exp(-exponential(unpack(positions).seeds, unpack(positions).positions, 1000).double().numpy())
    for cells in (
        np.floor(uniform * 50),
        np.floor(((uniform[1:] + uniform[:-1]) % 1.0) * 50),
        np.floor(((uniform[:, 1:] + uniform[:, :-1]) % 1.0) * 50),
    ):
        counts = np.bincount(cells.astype(int).ravel(), minlength=50)
        assert chi_square_p_value(counts, np.full(50, counts.sum() / 50)) > 1e-4
    # Each token, and each position, by itself: 1400 means of at least 400, five standard errors is one in a thousand.
    for axis in (0, 1):
        assert np.abs(uniform.mean(axis) - 0.5).max() < 5.2 * (1 / 12 / uniform.shape[axis]) ** 0.5


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    logits = logits_of(6)
    rows, seeds, positions = [(0, 1), (5, 2), (3, 4)], [11, 2**62, 11], [5, 0, 6]
    together, _ = draw(logits, logits, unpack(columns(3, rows=rows, seeds=seeds, positions=positions)))
    for i, pair in enumerate(rows):
        alone, _ = draw(
            logits, logits, unpack(columns(1, rows=[pair], seeds=seeds[i : i + 1], positions=positions[i : i + 1]))
        )
        assert alone.item() == together[i]


METHODS: dict[str, tuple[AlphaRule, float]] = {
    "kl_symmetry": (AlphaRule(), 1.0),
    "bounded": (AlphaRule(alpha_min=0.1, alpha_max=0.3), 1.0),
    "warm": (AlphaRule(), 0.7),
    "fixed": (AlphaRule(alpha_method="fixed", fixed_alpha=0.8), 1.0),
    "entropy": (AlphaRule(alpha_method="entropy"), 1.3),
    "ess_balance": (AlphaRule(alpha_method="ess_balance"), 1.0),
    "kl_budget": (AlphaRule(alpha_method="kl_budget", kl_budget=0.05), 1.0),
    "no budget": (AlphaRule(alpha_method="kl_budget", kl_budget=0.0), 1.0),
    "any budget": (AlphaRule(alpha_method="kl_budget", kl_budget=50.0), 1.0),
}
"""Rules, and the temperatures to try them at."""


def expected_alpha(rule: AlphaRule, logp_theta: np.ndarray, logp_t: np.ndarray) -> np.ndarray:
    solved = {
        "kl_symmetry": solve_alpha,
        "fixed": lambda *_: np.full(len(logp_theta), rule.fixed_alpha),
        "entropy": entropy_alpha,
        "ess_balance": ess_balance_alpha,
        "kl_budget": lambda *logps: kl_budget_alpha(*logps, rule.kl_budget),
    }[rule.alpha_method](logp_theta, logp_t)
    return np.clip(solved, rule.alpha_min, rule.alpha_max)


def eager(*_: Any) -> DrawInPlace:
    return compiled_draw("eager")


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> RowTable:
    monkeypatch.setattr(table_module, "_draw_of", eager)
    return RowTable(torch.device("cpu"), VOCAB, max_rows=4)


def step(table: RowTable, rows: list[tuple[int, DrawnRollout, Side, int]], logits: torch.Tensor) -> list[int]:
    """One step of `(row, pair, side, position)`; the tokens that vLLM then takes, one per row of the logits."""
    indices, pairs, sides, positions = zip(*rows, strict=True)
    table.place(np.array(indices), list(zip(pairs, sides, strict=True)), np.array(positions), same=False)
    table.apply(logits)
    return logits.argmax(1).tolist()


def record(table: RowTable, name: str) -> np.ndarray:
    return np.frombuffer(table.take([name])[name], np.float32).reshape(-1, len(NUMBERS))


def table_of_two_models(monkeypatch: pytest.MonkeyPatch, logits_t: torch.Tensor) -> RowTable:
    monkeypatch.setattr(table_module, "_draw_of", eager)
    vocab_size_t = logits_t.shape[1]
    return RowTable(torch.device("cpu"), VOCAB, max_rows=4, target_logits=lambda: logits_t, vocab_size_t=vocab_size_t)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("two_models", [False, True], ids=["one model", "two models"])
def test_numbers_are_those_of_the_models(
    table: RowTable, monkeypatch: pytest.MonkeyPatch, name: str, two_models: bool
) -> None:
    (rule, temperature), logits, of_t = METHODS[name], logits_of(8), logits_of(8, seed=1)
    if two_models:
        table = table_of_two_models(monkeypatch, of_t)
    records = [table.open(member(str(i), seed=i, rule=rule, temperature=temperature)) for i in range(4)]
    rows = [(2 * i + j, record, side, 0) for i, record in enumerate(records) for j, side in enumerate(("theta", "t"))]
    logp_theta, logp_t = (
        (of_side.double() / temperature).log_softmax(1).numpy()
        for of_side in (logits[::2], (of_t if two_models else logits)[1::2])
    )
    tokens = step(table, rows, logits)
    for i, alpha in enumerate(expected_alpha(rule, logp_theta, logp_t)):
        (found,) = record(table, str(i))
        token, theta, t = tokens[2 * i], logp_theta[i], logp_t[i]
        path = (1 - alpha) * theta + alpha * t
        q = path - np.log(np.exp(path).sum())
        kl_theta, kl_t = (np.exp(q) * (q - theta)).sum(), (np.exp(q) * (q - t)).sum()
        assert tokens[2 * i + 1] == token
        assert found == pytest.approx([token, alpha, q[token], theta[token], t[token], kl_theta, kl_t], abs=2e-4)


def test_one_row_is_both_sides_where_the_engine_has_two_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """π_t has fewer tokens: the others are never drawn, and each model's log-probabilities are of all its own. Beside
    it a rollout without a target, for which they are there. Chi-square of 4,000 positions each, false alarm one in
    10,000."""
    logits, of_t = logits_of(2), logits_of(2, seed=1, vocab=VOCAB - 20)
    table, logits_t = table_of_two_models(monkeypatch, of_t), of_t.clone()
    both, alone = table.open(member("both", "both")), table.open(member("alone", "alone"))
    for position in range(4000):
        step(table, [(0, both, "both", position), (1, alone, "alone", position)], logits.clone())
    assert torch.equal(of_t, logits_t)
    found, logp = record(table, "both"), logits.double().log_softmax(1).numpy()
    logp_t, tokens, alpha = of_t.double().log_softmax(1).numpy(), found[:, 0].astype(int), float(found[0, 1])
    q = np.exp((1 - alpha) * logp[0, : VOCAB - 20] + alpha * logp_t[0])
    assert chi_square_p_value(np.bincount(tokens, minlength=VOCAB - 20), 4000 * q / q.sum()) > 1e-4
    np.testing.assert_allclose(found[:, 3], logp[0, tokens], atol=1e-5)
    np.testing.assert_allclose(found[:, 4], logp_t[0, tokens], atol=1e-5)
    found = record(table, "alone")
    assert chi_square_p_value(np.bincount(found[:, 0].astype(int), minlength=VOCAB), 4000 * np.exp(logp[1])) > 1e-4


def test_other_rows_are_left_alone(table: RowTable) -> None:
    logits = logits_of(5)
    before, pair = logits.clone(), table.open(member("a"))
    tokens = step(table, [(3, pair, "theta", 0), (1, pair, "t", 0)], logits)
    changed = {(3, tokens[3]), (1, tokens[1])}
    assert tokens[3] == tokens[1]
    assert {tuple(index) for index in (logits != before).nonzero().tolist()} == changed
    assert all(logits[index] == FORCED for index in changed)


def test_a_rollout_without_a_target_is_drawn_from_the_policy(table: RowTable) -> None:
    logits = logits_of(1)
    logp = logits.double().log_softmax(1).numpy()
    (token,) = step(table, [(0, table.open(member("a", "alone")), "alone", 0)], logits)
    (found,) = record(table, "a")
    assert found[[0, 2, 3, 4]] == pytest.approx([token, *[logp[0, token]] * 3], abs=1e-5)


@pytest.mark.parametrize("rows", [[("theta", 0)], [("t", 0)], [("theta", 1), ("t", 0)]], ids=["theta", "t", "apart"])
def test_rows_out_of_step_get_the_mark(table: RowTable, rows: list[tuple[str, int]]) -> None:
    pair = table.open(member("a"))
    placed = [(i, pair, side, position) for i, (side, position) in enumerate(rows)]
    assert step(table, placed, logits_of(len(rows))) == [59] * len(rows)
    assert np.isnan(record(table, "a")[[position for _, position in rows]]).all()


def test_a_draw_with_a_prompt_that_was_only_partly_read_does_not_count(table: RowTable) -> None:
    """As the V1 runner shows it: π_t's row is there, its sample is dropped, and it is a token behind a step later."""
    pair = table.open(member("a"))
    step(table, [(0, pair, "theta", 0), (1, pair, "t", 0)], logits_of(2))
    assert step(table, [(0, pair, "theta", 1), (1, pair, "t", 0)], logits_of(2)) == [59, 59]
    assert np.isnan(record(table, "a")).all()


def test_steps_advance_on_the_device_as_they_would_anew(table: RowTable, monkeypatch: pytest.MonkeyPatch) -> None:
    """300 positions, across pages, while another pair begins and ends; little is sent but when the batch changes."""
    sent = []
    monkeypatch.setattr(table, "_send", lambda array: sent.append(1) or torch.from_numpy(array))
    pairs = {name: table.open(member(name, seed=i, start=10 * i)) for i, name in enumerate("ab")}
    drawn: dict[str, list[int]] = {"a": [], "b": []}
    before: list[tuple[int, DrawnRollout, str]] = []
    for k in range(300):
        rows = [(3, pairs["a"], "theta", k), (1, pairs["a"], "t", k)]
        if 100 <= k < 240:
            rows += [(0, pairs["b"], "t", k - 100), (2, pairs["b"], "theta", k - 100)]
        placed = [row[:3] for row in rows]
        logits = logits_of(4, seed=k)
        table.place(
            np.array([row[0] for row in rows]),
            [(row[1], row[2]) for row in rows],
            np.array([row[3] for row in rows]),
            same=placed == before,
        )
        before = placed
        alone = {}
        for name, theta, t, position in (("a", 3, 1, k), ("b", 2, 0, k - 100)):
            number = "ab".index(name)
            single = columns(1, rows=[(theta, t)], seeds=[number], positions=[10 * number + position])
            alone[name] = draw(logits, logits, unpack(single))[0].item()
        table.apply(logits)
        for name, row in (("a", 3), ("b", 2)):
            if any(pair is pairs[name] for _, pair, _ in placed):
                drawn[name].append(int(logits[row].argmax()))
                assert drawn[name][-1] == alone[name]
    assert len(sent) < 10
    for name, tokens in drawn.items():
        assert record(table, name)[:, 0].tolist() == tokens
    assert len(drawn["a"]) == 300 > 2 * PAGE


def test_pages_are_used_again_and_grow(table: RowTable) -> None:
    before = sorted(table._free)
    pairs = [table.open(member(str(i), "alone")) for i in range(40)]
    step(table, [(i, pair, "alone", 3 * PAGE) for i, pair in enumerate(pairs)], logits_of(40))
    assert all(len(table.take([str(i)])[str(i)]) == 4 * len(NUMBERS) * (3 * PAGE + 1) for i in range(40))
    assert set(before) <= set(table._free) and len(set(table._free)) == len(table._free) >= 160


def test_what_a_taken_pair_still_draws_is_dropped(table: RowTable) -> None:
    pair = table.open(member("a"))
    rows = [(0, pair, "theta", 0), (1, pair, "t", 0)]
    step(table, rows, logits_of(2))
    table.take(["a", "unknown"])
    logits = logits_of(2)
    before = logits.clone()
    step(table, [(row, pair, side, 1) for row, pair, side, _ in rows], logits)
    assert torch.equal(logits, before) and table.take(["a"]) == {}


def test_a_request_says_what_it_is() -> None:
    told = member("a", rule=AlphaRule(alpha_max=0.5))
    assert Member.from_extra_args(told.to_extra_args()) == told
    assert Member.from_extra_args(None) is None and Member.from_extra_args({"other": 1}) is None
    for changed in ({"seed": -1}, {"temperature": 0.0}, {"side": "left"}, {"rollout": ""}, {"mark": True}):
        with pytest.raises(ValueError, match=r"name and a side|must be a whole number|temperature must be"):
            dataclasses.replace(told, **changed)
    with pytest.raises(ValueError, match="POST"):
        Member.from_extra_args({"dual_rollout": {"rollout": "a"}})


def test_nothing_is_compiled_after_the_start() -> None:
    """For any numbers of rows and rollouts, with and without a target."""
    torch._dynamo.reset()  # other tests have compiled it for other vocabularies, and there is a limit
    with torch.inference_mode():  # as vLLM makes them
        theta, t = logits_of(40), logits_of(40, seed=1)
    table = RowTable(
        torch.device("cpu"), VOCAB, 4, backend="eager", target_logits=lambda: t[: len(rows)], vocab_size_t=VOCAB
    )
    compiled = counters["stats"]["unique_graphs"]
    with torch.inference_mode():
        for count in (1, 2, 3, 7, 40):
            sides: list[Side] = ["both", "alone"]
            rows = [
                (i, table.open(member(f"{count}.{i}", sides[i % 2], seed=i)), sides[i % 2], 0) for i in range(count)
            ]
            step(table, rows, theta[:count].clone())
    assert 0 < compiled == counters["stats"]["unique_graphs"]
