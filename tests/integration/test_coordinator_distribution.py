"""The distribution of what comes out of the coordinator, over HTTP, against one that is enumerated here.

Both models are Markov chains, so q* of every position and the probability of every sequence are known.

Each χ² test fails for a correct program with probability 1e-4, each comparison of a mean (5 standard errors) with
6e-7. Seeds are fixed, so an outcome does not change from run to run. With 400 sequences of two tokens, a total
variation of 0.2 is found with a probability of about 0.9; what q* is at each position is compared digit by digit, and
tests/unit/test_block.py measures what the tests of block decoding would find.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from dual_rollout import CoordinatorConfig, DualVLLMCoordinator, GenerationOutput
from dual_rollout.coordinator import CoordinatorStats
from dual_rollout.exceptions import PreflightError
from tests.chi_square import chi_square_p_value, standard_errors_off
from tests.exact_distribution import position_distribution, tempered
from tests.hang import HANG
from tests.markov_server import MarkovServer, random_chain

V = 9
START = 3
FALSE_ALARM = 1e-4
STANDARD_ERRORS = 5.0
THETA = random_chain(np.random.default_rng(1), V, sharpness=1.2)
T = random_chain(np.random.default_rng(2), V, sharpness=1.2)


@dataclass(frozen=True)
class Case:
    """A configuration and how much to draw. Options are the fields of `CoordinatorConfig`."""

    name: str
    options: dict[str, Any]
    sequences: int = 800
    tokens: int = 2
    server: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def __hash__(self) -> int:
        return hash(self.name)


CASES = [
    Case("union-all", {"top_k": V}, tokens=3),
    Case("union-3", {"top_k": 3}),
    Case("union-1", {"top_k": 1}),
    Case("union-3-exact", {"top_k": 3, "missing": "exact"}, sequences=400),
    Case("union-all-exact", {"top_k": V, "missing": "exact"}, sequences=400),
    Case("tail-2-floor", {"top_k": 2, "support": "tail"}, sequences=600),
    Case("tail-3-exact", {"top_k": 3, "support": "tail", "missing": "exact"}, sequences=400),
    Case("tail-all", {"top_k": V, "support": "tail"}),
    Case("fixed-0", {"top_k": V, "alpha_method": "fixed", "fixed_alpha": 0.0}),
    Case("fixed-0.3", {"top_k": 4, "alpha_method": "fixed", "fixed_alpha": 0.3}),
    Case("fixed-1", {"top_k": V, "alpha_method": "fixed", "fixed_alpha": 1.0}),
    Case("alpha-min", {"top_k": V, "alpha_min": 0.55}),
    Case("alpha-max", {"top_k": V, "alpha_max": 0.45}),
    Case("temperature-raw", {"top_k": V, "temperature": 0.7}),
    Case("temperature-hot-raw", {"top_k": V, "temperature": 1.6}),
    Case("temperature-exact-raw", {"top_k": V, "temperature": 0.7, "missing": "exact"}, sequences=300),
    # Such servers list the sampled token besides the k most likely: S must not depend on it.
    Case("temperature-processed-3", {"top_k": 3, "temperature": 0.7}, server={"processed": True}),
    Case(
        "temperature-processed-tail",
        {"top_k": 3, "temperature": 1.5, "support": "tail", "missing": "exact"},
        sequences=400,
        server={"processed": True},
    ),
    # So many that each wrong rule in tests/unit/test_block.py would be found.
    Case("block-union-3", {"decoding": "block", "top_k": 3}, sequences=1200),
    *(
        Case(f"block-{name}", {"decoding": "block", **options}, sequences=400, server=server)
        for name, options, server in (
            ("union-all", {"top_k": V, "num_draft_tokens": 3}, {}),
            ("union-1", {"top_k": 1, "num_draft_tokens": 2}, {}),
            ("one-draft-token", {"top_k": 3, "num_draft_tokens": 1}, {}),
            ("union-3-exact", {"top_k": 3, "missing": "exact", "num_draft_tokens": 2}, {}),
            ("tail-2", {"top_k": 2, "support": "tail"}, {}),
            ("tail-3-exact", {"top_k": 3, "support": "tail", "missing": "exact", "num_draft_tokens": 2}, {}),
            ("fixed", {"top_k": 4, "alpha_method": "fixed", "fixed_alpha": 0.3}, {}),
            ("fixed-1", {"top_k": V, "alpha_method": "fixed", "fixed_alpha": 1.0}, {}),
            ("alpha-max", {"top_k": V, "alpha_max": 0.45}, {}),
            ("processed", {"top_k": 3, "temperature": 0.7}, {"processed": True}),
            ("processed-tail", {"top_k": 3, "temperature": 1.5, "support": "tail"}, {"processed": True}),
        )
    ),
    Case("no-logit-bias", {"top_k": 2, "support": "tail"}, sequences=500, server={"ignore": ("logit_bias",)}),
]
by_case = pytest.mark.parametrize("case", CASES, ids=str)


# ---- the exact distribution -----------------------------------------------------------------------------------------


@functools.cache
def exact_position(case: Case, last: int) -> tuple[float, np.ndarray]:
    """α and q* on the whole vocabulary after token `last`."""
    p, r = (tempered(chain[last], case.options.get("temperature", 1.0)) for chain in (THETA, T))
    return position_distribution(p, r, case.options)


def sequence_probabilities(rows: Any, tokens: int) -> dict[tuple[int, ...], float]:
    """Probability of every sequence; `rows(last)` is the next-token distribution."""
    probabilities = {}
    for sequence in itertools.product(range(V), repeat=tokens):
        steps = itertools.pairwise((START, *sequence))
        probabilities[sequence] = math.prod(rows(last)[token] for last, token in steps)
    return probabilities


def policy_distribution(case: Case) -> dict[tuple[int, ...], float]:
    temperature = case.options.get("temperature", 1.0)
    return sequence_probabilities(lambda last: tempered(THETA[last], temperature), case.tokens)


# ---- what the program does ------------------------------------------------------------------------------------------


def generate(
    prompts: list[Any],
    *,
    chains: tuple[np.ndarray, np.ndarray] = (THETA, T),
    server: dict[str, Any] | None = None,
    max_tokens: int = 8,
    stop_token_ids: tuple[int, ...] = (),
    **options: Any,
) -> tuple[list[GenerationOutput], CoordinatorStats]:
    async def run() -> tuple[list[GenerationOutput], CoordinatorStats]:
        servers = [MarkovServer(chain, **server or {}) for chain in chains]
        async with servers[0].running() as theta, servers[1].running() as t:
            values = {"seed": 11, "decoding": "lockstep", **options}
            config = CoordinatorConfig(theta_url=theta.url, t_url=t.url, **values)
            async with DualVLLMCoordinator(config) as coordinator:
                outputs = await coordinator.generate_batch(
                    prompts, max_tokens=max_tokens, stop_token_ids=stop_token_ids
                )
                return outputs, coordinator.stats

    return asyncio.run(asyncio.wait_for(run(), HANG))


@functools.cache
def rollouts(case: Case) -> tuple[list[GenerationOutput], CoordinatorStats]:
    outputs, stats = generate(
        [[START]] * case.sequences,
        server=case.server,
        max_tokens=case.tokens,
        max_concurrency=1000,
        **case.options,
    )
    assert [output.error for output in outputs] == [None] * case.sequences
    return outputs, stats


# ---- tests ----------------------------------------------------------------------------------------------------------


@by_case
def test_frequencies_of_sequences(case):
    expected = sequence_probabilities(lambda last: exact_position(case, last)[1], case.tokens)
    assert sum(expected.values()) == pytest.approx(1)
    drawn = [tuple(output.generated_tokens) for output in rollouts(case)[0]]
    observed = np.array([drawn.count(sequence) for sequence in expected])
    assert observed.sum() == case.sequences
    assert chi_square_p_value(observed, case.sequences * np.array(list(expected.values()))) > FALSE_ALARM


@by_case
def test_the_record_is_exact(case):
    """α, log q*, log π_θ and the weight of every token, those included that a list lacked or that lie in the tail."""
    temperature = case.options.get("temperature", 1.0)
    for output in rollouts(case)[0]:
        record = zip(
            itertools.pairwise([START, *output.generated_tokens]),
            output.alpha_history,
            output.logprobs_q,
            output.logprobs_theta,
            output.logprobs_t,
            output.importance_weights,
            strict=True,
        )
        for (last, token), alpha, log_q, log_theta, log_t, weight in record:
            exact_alpha, q = exact_position(case, last)
            p, r = (tempered(chain[last], temperature)[token] for chain in (THETA, T))
            assert alpha == pytest.approx(exact_alpha, abs=1e-7)
            assert log_q == pytest.approx(math.log(q[token]), abs=1e-6)
            assert log_theta == pytest.approx(math.log(p), abs=1e-6)
            assert log_t == pytest.approx(math.log(r), abs=1e-6)
            assert weight == pytest.approx(p / q[token], rel=1e-6)


STOP = 5
ENDS = {
    "lockstep": ({"decoding": "lockstep"}, {}),
    "block": ({"decoding": "block", "num_draft_tokens": 8}, {}),
    "the server's own EOS": (
        {"decoding": "block", "num_draft_tokens": 8},
        {"eos": STOP, "ignore": ("stop_token_ids", "ignore_eos")},
    ),
    "drafts end early": ({"decoding": "block", "num_draft_tokens": 8}, {"eos": 2, "ignore": ("ignore_eos",)}),
    "drafts go on": ({"decoding": "block", "num_draft_tokens": 8}, {"ignore": ("stop_token_ids",)}),
}


@pytest.mark.parametrize("way", ENDS)
@pytest.mark.parametrize("options", [{"top_k": 4}, {"top_k": 2, "support": "tail"}], ids=["union", "tail"])
def test_sequences_end_where_they_should_inside_a_block_too(way, options):
    """At a stop id, drafted or redrawn, or at `max_tokens`: the distribution of whole sequences, enumerated.

    Whether a draft ends with the stop id, before it at another EOS of the server, or goes on past it.
    """
    (decoding, server), tokens, sequences = ENDS[way], 3, 300
    outputs, stats = generate(
        [[START]] * sequences,
        server=server,
        max_tokens=tokens,
        stop_token_ids=(STOP,),
        max_concurrency=1000,
        **decoding,
        **options,
    )
    q = [position_distribution(p, r, options)[1] for p, r in zip(THETA, T, strict=True)]
    expected: dict[tuple[int, ...], float] = {}
    for sequence, probability in sequence_probabilities(lambda last: q[last], tokens).items():
        ended = sequence[: sequence.index(STOP) + 1] if STOP in sequence else sequence
        expected[ended] = expected.get(ended, 0.0) + probability
    drawn = [tuple(output.generated_tokens) for output in outputs]
    observed = np.array([drawn.count(sequence) for sequence in expected])
    assert observed.sum() == sequences and sum(expected.values()) == pytest.approx(1)
    assert chi_square_p_value(observed, sequences * np.array(list(expected.values()))) > FALSE_ALARM
    for output in outputs:
        assert output.error is None
        assert output.finish_reason == ("stop" if output.generated_tokens[-1] == STOP else "length")
        record = (output.alpha_history, output.logprobs_q, output.logprobs_theta, output.importance_weights)
        assert [len(values) for values in record] == [len(output.generated_tokens)] * 4
    lengths = [len(sequence) for sequence in drawn]
    assert all(lengths.count(n) > 10 for n in (1, 2, 3))
    assert stats.decoding.tokens == sum(lengths)
    if decoding["decoding"] == "block" and way != "drafts go on":
        assert 0 < stats.decoding.accepted_tokens <= stats.decoding.tokens


def features(sequence: tuple[int, ...]) -> list[float]:
    return [1.0, float(sequence[0]), float(sum(sequence) % 4 == 1), float(sequence[-1] in (2, 5)), sequence[-1] ** 2.0]


FULL_SUPPORT = [case for case in CASES if case.options["top_k"] == V or case.options.get("support") == "tail"]


@pytest.mark.parametrize("case", FULL_SUPPORT, ids=str)
def test_weighted_means_are_the_policys(case):
    """E_q[w f] = E_π_θ[f] over whole rollouts, wherever q* has the policy's support."""
    outputs = rollouts(case)[0]
    weights = np.array([math.prod(output.importance_weights) for output in outputs])
    values = np.array([features(tuple(output.generated_tokens)) for output in outputs])
    policy = policy_distribution(case)
    for column in range(values.shape[1]):
        expectation = sum(p * features(sequence)[column] for sequence, p in policy.items())
        samples = weights * values[:, column]
        if samples.std() < 1e-9:  # α = 0: every weight is 1
            assert samples.mean() == pytest.approx(expectation)
        else:
            assert standard_errors_off(samples, expectation) < STANDARD_ERRORS


@pytest.mark.parametrize("case", [case for case in CASES if case not in FULL_SUPPORT], ids=str)
def test_truncated_support_loses_the_mass_outside(case):
    """With support="union" and k < V the weights' mean is the policy's mass on what q* can reach, no more."""
    outputs = rollouts(case)[0]
    weights = np.array([math.prod(output.importance_weights) for output in outputs])
    q = sequence_probabilities(lambda last: exact_position(case, last)[1], case.tokens)
    reachable = sum(p for sequence, p in policy_distribution(case).items() if q[sequence] > 0)
    assert reachable < 0.99
    assert standard_errors_off(weights, reachable) < STANDARD_ERRORS


def test_tail_tokens_are_counted():
    case = next(case for case in CASES if case.name == "tail-2-floor")
    outputs, stats = rollouts(case)
    drawn = [pair for output in outputs for pair in itertools.pairwise([START, *output.generated_tokens])]
    outside = 0
    for last, token in drawn:
        lists = {y for chain in (THETA, T) for y in np.argsort(-chain[last])[:2].tolist()}
        outside += token not in lists
    assert outside > 100
    assert stats.decoding.tail_tokens == outside
    assert stats.decoding.tail_draws == outside  # the exclusion makes the first draw succeed
    assert stats.decoding.approximate_tail_weights == 0
    assert stats.decoding.tokens == len(drawn)


def test_a_drafted_token_outside_both_lists_is_not_drawn_again():
    stats = rollouts(next(case for case in CASES if case.name == "block-tail-3-exact"))[1]
    assert stats.decoding.tail_draws < 0.5 * stats.decoding.tail_tokens


def test_without_logit_bias_the_tail_costs_more_draws():
    stats = rollouts(next(case for case in CASES if case.name == "no-logit-bias"))[1]
    assert stats.decoding.tail_draws > 1.5 * stats.decoding.tail_tokens > 0


def test_without_named_logprobs_tail_weights_are_approximate_and_counted():
    case = Case("no-names", {"top_k": 2, "support": "tail"}, sequences=500, server={"ignore": ("logprob_token_ids",)})
    outputs, stats = rollouts(case)
    assert 0 < stats.decoding.approximate_tail_weights <= stats.decoding.tail_tokens
    # What is drawn has the exact distribution all the same.
    expected = sequence_probabilities(lambda last: exact_position(case, last)[1], case.tokens)
    drawn = [tuple(output.generated_tokens) for output in outputs]
    observed = np.array([drawn.count(sequence) for sequence in expected])
    assert chi_square_p_value(observed, case.sequences * np.array(list(expected.values()))) > FALSE_ALARM


@pytest.mark.parametrize("options", [{}, {"support": "tail"}, {"decoding": "block"}], ids=str)
@pytest.mark.parametrize("temperature", [1e-3, 2.5])
def test_a_temperature_that_a_server_does_not_draw_at_is_refused_at_once(options, temperature):
    """vLLM takes anything below 0.01 as that, and nothing above 2. Where it draws nothing, any temperature will do."""
    server = {"processed": options.get("decoding") == "block"}
    values = {"top_k": V, "temperature": temperature, "server": server, **options}
    if options:
        with pytest.raises(PreflightError, match=f"theta_url refuses temperature {temperature:g}: .*temperature"):
            generate([[START]] * 16, **values)
        return
    outputs, _ = generate([[START]] * 16, **values)
    for output in outputs:
        assert output.error is None
        assert all(0 <= weight < 1e3 for weight in output.importance_weights)


def test_exact_needs_named_logprobs():
    with pytest.raises(PreflightError, match='missing="floor"'):
        generate([[START]], top_k=2, missing="exact", server={"ignore": ("logprob_token_ids",)})


@pytest.mark.parametrize(
    "options", [{"top_k": V}, {"top_k": 3}, {"top_k": 3, "support": "tail", "missing": "exact"}], ids=str
)
def test_swapping_the_servers_mirrors_alpha(options):
    prompts = [[i % V] for i in range(40)]
    forward = generate(prompts, max_tokens=4, **options)[0]
    backward = generate(prompts, chains=(T, THETA), max_tokens=4, **options)[0]
    for a, b in zip(forward, backward, strict=True):
        # A tail token is drawn from π_θ by its server, so tokens agree up to the first of them.
        same = [x == y for x, y in zip(a.generated_tokens, b.generated_tokens, strict=True)]
        until = same.index(False) if False in same else len(same)
        assert until > 0 or options.get("support") == "tail"
        assert until == len(same) or options.get("support") == "tail"
        np.testing.assert_allclose(b.alpha_history[: until + 1], 1 - np.array(a.alpha_history[: until + 1]), atol=1e-8)
        np.testing.assert_allclose(a.logprobs_theta[:until], b.logprobs_t[:until], atol=1e-9)
        if options.get("support") != "tail":
            np.testing.assert_allclose(a.logprobs_q, b.logprobs_q, atol=1e-7)


def test_lists_that_hold_the_vocabulary_together_leave_no_tail():
    """Where each lacks tokens that the other has: a tail would have no token to draw."""
    theta = np.tile([0.4, 0.3, 0.2, 0.1], (4, 1))
    outputs, stats = generate([[0]] * 50, chains=(theta, theta[:, ::-1]), top_k=2, support="tail", max_tokens=4)
    assert [output.error for output in outputs] == [None] * 50
    assert stats.decoding.tail_tokens == 0 and stats.decoding.disjoint_positions == 0


def test_identical_servers_give_one_half_and_unit_weights():
    outputs, _ = generate([[i] for i in range(V)], chains=(THETA, THETA), top_k=V)
    for output in outputs:
        assert output.alpha_history == [0.5] * 8
        np.testing.assert_allclose(output.importance_weights, 1, rtol=1e-12)


@pytest.mark.parametrize("decoding", ["lockstep", "block"])
@pytest.mark.parametrize("agree", [True, False], ids=["same token", "other token"])
def test_a_policy_that_is_certain_to_float32_keeps_its_tail(decoding, agree):
    """Its list of one token says 0.0. What that leaves open is what float32 can hide, for q* as for the weight."""
    hidden = 1e-9
    first = np.roll(np.eye(V), 1, axis=1)
    second = first if agree else np.roll(np.eye(V), 2, axis=1)
    chains = (1 - hidden * V) * first + hidden, 0.4 * second + 0.6 / V
    options = {"top_k": 1, "support": "tail", "alpha_min": 0.9, "decoding": decoding, "num_draft_tokens": 2}
    outputs, stats = generate([[START]] * 200, chains=chains, max_tokens=1, server={"float32": True}, **options)
    alpha, q = position_distribution(chains[0][START], chains[1][START], options)
    listed = sorted({int(np.argmax(chain[START])) for chain in chains})
    outside = 1 - q[listed].sum()
    expected = 200 * np.array([*q[listed], outside])
    observed = [sum(output.generated_tokens == [token] for output in outputs) for token in listed]
    assert chi_square_p_value([*observed, 200 - sum(observed)], expected) > FALSE_ALARM
    assert stats.decoding.tail_tokens > 10 and not stats.decoding.disjoint_positions
    for output in outputs:
        (token,) = output.generated_tokens
        assert output.alpha_history == pytest.approx([alpha], abs=1e-6)
        assert output.logprobs_theta == pytest.approx([math.log(chains[0][START, token])], abs=1e-6)
        weight = chains[0][START, token] / q[token] if token in listed else 2.0**-23 / outside
        assert output.importance_weights == pytest.approx([weight], rel=1e-5)
        assert output.logprobs_q == pytest.approx([output.logprobs_theta[0] - math.log(weight)], abs=1e-5)


def test_lists_that_share_no_token_fall_back_to_the_policy():
    """Lists of fewer tokens than were asked for: nothing else is possible."""
    theta, t = np.zeros((4, 4)), np.zeros((4, 4))
    theta[:, :2], t[:, 2:] = 0.5, 0.5
    outputs, stats = generate([[0]] * 20, chains=(theta, t), top_k=3, max_tokens=3)
    assert stats.decoding.disjoint_positions == 60
    for output in outputs:
        assert output.error is None and set(output.generated_tokens) <= {0, 1}
        assert output.alpha_history == [0.0] * 3
        np.testing.assert_allclose(output.importance_weights, 1)
