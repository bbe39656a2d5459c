"""What the coordinator promises besides q*: seeds, isolation of faults, stops, streaming, text, errors."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
import pytest

from dual_rollout import CoordinatorConfig, DualVLLMCoordinator, GenerationOutput, generate_with_optimal_sampling
from dual_rollout.exceptions import DualRolloutError, EngineError, PreflightError
from dual_rollout.preflight import check_servers
from dual_rollout.samplers import two_servers
from dual_rollout.types import GenerationRequest, StreamChunk
from tests.hang import HANG
from tests.integration.conftest import TinyPair
from tests.markov_server import MarkovServer, random_chain
from tests.tiny_model import make_tokenizer

V = 10
THETA = random_chain(np.random.default_rng(1), V)
T = random_chain(np.random.default_rng(2), V)
SUPPORTS = [{}, {"top_k": 3}, {"top_k": 2, "support": "tail"}, {"top_k": 3, "support": "tail", "missing": "exact"}]


@contextlib.asynccontextmanager
async def coordinator(
    chains: tuple[np.ndarray, np.ndarray] = (THETA, T),
    *,
    server: dict[str, Any] | None = None,
    tokenizer: Any = None,
    **options: Any,
) -> AsyncIterator[DualVLLMCoordinator]:
    servers = [MarkovServer(chain, **server or {}) for chain in chains]
    async with servers[0].running() as theta, servers[1].running() as t:
        values = {"top_k": V, "seed": 5, "decoding": "lockstep", "max_retries": 0, **options}
        config = CoordinatorConfig(theta_url=theta.url, t_url=t.url, **values)
        async with DualVLLMCoordinator(config, tokenizer=tokenizer) as opened:
            yield opened


def generate(prompts: list[Any], *, call: dict[str, Any] | None = None, **options: Any) -> list[GenerationOutput]:
    async def run() -> list[GenerationOutput]:
        async with coordinator(**options) as opened:
            return await opened.generate_batch(prompts, **{"max_tokens": 6, **(call or {})})

    return asyncio.run(asyncio.wait_for(run(), HANG))


def tokens(outputs: list[GenerationOutput]) -> list[list[int]]:
    assert [output.error for output in outputs] == [None] * len(outputs)
    return [output.generated_tokens for output in outputs]


# ---- ways to decode -------------------------------------------------------------------------------------------------


def test_drafts_at_a_temperature_need_its_log_probabilities():
    with pytest.raises(PreflightError, match=r"theta_url .* --logprobs-mode processed_logprobs"):
        generate([[1]], decoding="block", temperature=0.7)
    assert len(tokens(generate([[1]], decoding="block", temperature=0.7, server={"processed": True}))) == 1


def test_the_statistics_say_what_auto_chose_and_why():
    async def run() -> None:
        async with coordinator(decoding="auto", seed=None, ignore_eos=True, max_concurrency=4) as opened:
            assert opened.stats.chosen == opened.stats.tuning == {}
            await opened.generate_batch([[i % V] for i in range(40)], max_tokens=30)
            measured = opened.stats.tuning["t_url"]["4 sequences, 64 tokens"]
            assert {"lockstep, 1 group", "lockstep, 2 groups"} < set(measured)
            assert any("block" in name for name in measured)
            assert opened.stats.chosen["t_url"] in measured
            # A seed makes the tokens independent of the clock: nothing is drafted.
            drafted = opened.stats.decoding.draft_tokens
            assert drafted > 0
            await opened.generate_batch([[i % V] for i in range(8)], max_tokens=30, seed=1)
            assert opened.stats.decoding.draft_tokens == drafted

    asyncio.run(asyncio.wait_for(run(), HANG))


def test_a_batch_that_runs_out_is_no_measure_of_a_choice():
    async def run() -> None:
        async with coordinator(decoding="auto", seed=None, ignore_eos=True, max_concurrency=4) as opened:
            for _ in range(12):  # a first measurement takes 6 rounds
                await opened.generate_batch([[i] for i in range(4)], max_tokens=4)
            assert opened.stats.chosen == opened.stats.tuning == {}
            for _ in range(12):
                await opened.generate_batch([[i] for i in range(4)], max_tokens=30)
            assert opened.stats.chosen["t_url"] in opened.stats.tuning["t_url"]["4 sequences, 64 tokens"]

    asyncio.run(asyncio.wait_for(run(), HANG))


# ---- seeds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", SUPPORTS, ids=str)
def test_same_seed_same_tokens_whatever_the_concurrency(options):
    prompts = [[i % V] for i in range(12)]
    reference = tokens(generate(prompts, **options))
    for max_concurrency in (1, 5):
        assert tokens(generate(prompts, max_concurrency=max_concurrency, **options)) == reference


@pytest.mark.parametrize("options", SUPPORTS, ids=str)
def test_a_sequence_does_not_depend_on_the_others(options):
    prompts = [[i % V] for i in range(12)]
    changed = [prompt if i % 3 == 0 else [V - 1 - prompt[0], 2] for i, prompt in enumerate(prompts)]
    a, b = tokens(generate(prompts, **options)), tokens(generate(changed, **options))
    assert a[::3] == b[::3]
    assert a != b
    assert tokens(generate(prompts[:4], **options)) == a[:4]


def test_seeds_differ():
    prompts = [[1]] * 8
    assert len({str(tokens(generate(prompts, seed=seed))) for seed in (0, 1, 2)}) == 3
    assert len({str(sequence) for sequence in tokens(generate(prompts))}) > 1  # nor do sequences of a batch repeat


def test_without_a_seed_calls_differ():
    prompts = [[1]] * 8
    assert tokens(generate(prompts, seed=None)) != tokens(generate(prompts, seed=None))


def test_a_calls_seed_and_temperature_override_the_configs():
    prompts = [[1]] * 8
    assert tokens(generate(prompts, seed=7, temperature=0.5)) == tokens(
        generate(prompts, seed=1, call={"seed": 7, "temperature": 0.5})
    )


def test_sampling_does_not_depend_on_diagnostics():
    assert tokens(generate([[1], [2]])) == tokens(generate([[1], [2]], call={"return_diagnostics": True}))


# ---- a fault is one prompt's ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [0, 4, 8])
@pytest.mark.parametrize("prompt", [[3, V + 5], [], [-1], "text without a tokenizer?", 7], ids=str)
def test_a_bad_prompt_fails_alone(bad, prompt):
    good = [[i] for i in range(9)]
    reference = tokens(generate(good))
    prompts = [prompt if i == bad else p for i, p in enumerate(good)]
    if isinstance(prompt, str):
        with pytest.raises(ValueError, match="tokenizer"):
            generate(prompts)
        return
    outputs = generate(prompts)
    assert outputs[bad].error and outputs[bad].finish_reason is None and outputs[bad].generated_tokens == []
    others = [output for i, output in enumerate(outputs) if i != bad]
    assert tokens(others) == [sequence for i, sequence in enumerate(reference) if i != bad]


def test_the_error_of_a_refused_prompt_is_the_servers():
    outputs = generate([[1], [V + 5]])
    assert "out of vocabulary" in outputs[1].error


def test_a_prompt_too_long_for_the_context_says_what_to_do():
    outputs = generate([[1] * 5, [1] * 30], server={"max_model_len": 32})
    assert outputs[0].error is None
    assert "max_tokens" in outputs[1].error and "--max-model-len" in outputs[1].error


@pytest.mark.parametrize(
    ("prompts", "call", "message"),
    [
        ("one string", {}, "list of prompts"),
        ([[1]], {"max_tokens": 0}, "max_tokens"),
        ([[1]], {"max_tokens": 1.5}, "max_tokens"),
        ([[1]], {"t_prompts": [[1], [2]]}, "t_prompts"),
        ([[1]], {"temperature": -1.0}, "temperature"),
        ([[1]], {"seed": -1}, "seed"),
    ],
)
def test_wrong_arguments_are_refused_by_name(prompts, call, message):
    with pytest.raises(ValueError, match=message):
        generate(prompts, call=call)


def test_no_prompts_no_outputs():
    assert generate([]) == []


def test_a_server_that_is_not_there_is_named():
    async def run() -> None:
        async with MarkovServer(THETA).running() as theta:
            config = CoordinatorConfig(theta_url=theta.url, t_url="http://127.0.0.1:9", max_retries=0, top_k=V)
            async with DualVLLMCoordinator(config) as opened:
                await opened.generate_batch([[1]], max_tokens=2)

    with pytest.raises(DualRolloutError, match=r"http://127\.0\.0\.1:9\b"):
        asyncio.run(asyncio.wait_for(run(), HANG))


def test_a_wrong_model_name_lists_the_served_ones():
    with pytest.raises(EngineError, match=r"chain.*theta_model"):
        generate([[1]], theta_model="other")


def test_a_server_that_dies_on_the_way_keeps_the_tokens_so_far():
    async def run() -> list[GenerationOutput]:
        async with MarkovServer(THETA).running() as theta, contextlib.AsyncExitStack() as stack:
            t = await stack.enter_async_context(MarkovServer(T).running())
            config = CoordinatorConfig(
                theta_url=theta.url, t_url=t.url, top_k=V, seed=1, max_retries=0, decoding="lockstep"
            )
            async with DualVLLMCoordinator(config) as opened:
                task = asyncio.create_task(opened.generate_batch([[1], [2]], max_tokens=4000))
                while len(t.requests) < 12:
                    await asyncio.sleep(0.001)
                await stack.aclose()
                return await task

    for output in asyncio.run(asyncio.wait_for(run(), HANG)):
        assert output.error and output.finish_reason is None
        assert 0 < len(output.generated_tokens) < 4000
        assert len(output.logprobs_q) == len(output.importance_weights) == len(output.generated_tokens)
        assert np.isfinite(output.logprobs_q).all()


# ---- prompts, stops, lengths ----------------------------------------------------------------------------------------


def test_max_tokens_is_reached_exactly():
    for output in generate([[i] for i in range(6)], call={"max_tokens": 5}):
        assert len(output.generated_tokens) == 5 and output.finish_reason == "length"
        for name in ("alpha_history", "logprobs_q", "logprobs_theta", "logprobs_t", "importance_weights"):
            values = getattr(output, name)
            assert len(values) == 5 and all(type(value) is float for value in values)


def test_stop_tokens_end_a_sequence_and_are_kept():
    free = tokens(generate([[i] for i in range(9)], call={"max_tokens": 20}))
    outputs = generate([[i] for i in range(9)], call={"max_tokens": 20, "stop_token_ids": [4, 7]})
    for sequence, output in zip(free, outputs, strict=True):
        stops = [i for i, token in enumerate(sequence) if token in (4, 7)]
        assert output.generated_tokens == (sequence[: stops[0] + 1] if stops else sequence)
        assert output.finish_reason == ("stop" if stops else "length")
    assert {output.finish_reason for output in outputs} >= {"stop"}


def test_finished_sequences_make_room_for_waiting_ones():
    prompts = [[i % V] for i in range(30)]
    call = {"max_tokens": 15, "stop_token_ids": [0, 1]}
    assert tokens(generate(prompts, call=call, max_concurrency=4)) == tokens(generate(prompts, call=call))


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_end_of_sequence_of_the_tokenizer(ignore_eos):
    tokenizer = make_tokenizer()
    eos = tokenizer.eos_token_id
    size = len(tokenizer)
    p = np.full((size, size), 0.1 / (size - 2))
    p[:, 5], p[:, eos] = 0.45, 0.45
    p /= p.sum(axis=1, keepdims=True)
    outputs = generate(
        [[5]] * 8, chains=(p, p), tokenizer=tokenizer, top_k=20, ignore_eos=ignore_eos, call={"max_tokens": 12}
    )
    for output in outputs:
        ends = [i for i, token in enumerate(output.generated_tokens) if token == eos]
        if output.finish_reason == "stop":
            assert not ignore_eos and ends == [len(output.generated_tokens) - 1]
        else:
            assert len(output.generated_tokens) == 12 and (ignore_eos or not ends)
    assert any(output.finish_reason == "stop" for output in outputs) is not ignore_eos


def test_the_target_may_see_another_prompt():
    """With k = V and α = 1 the first token follows π_t given its own prompt."""
    certain = np.eye(V)[(np.arange(V) + 1) % V] * 0.999 + 0.0001
    certain /= certain.sum(axis=1, keepdims=True)
    flat = np.full((V, V), 1 / V)
    outputs = generate(
        [[1]] * 6,
        chains=(flat, certain),
        alpha_method="fixed",
        fixed_alpha=1.0,
        call={"max_tokens": 2, "t_prompts": [[6]] * 6},
    )
    assert tokens(outputs) == [[7, 8]] * 6
    assert all(output.prompt_token_ids == [1] for output in outputs)


def test_lists_longer_than_the_vocabulary_are_whole():
    assert tokens(generate([[1], [2]], top_k=100)) == tokens(generate([[1], [2]], top_k=V))


def test_impossible_tokens_are_never_sampled():
    theta, t = THETA.copy(), T.copy()
    theta[:, [0, 4]] = 0.0
    t[:, [4, 7]] = 0.0
    theta, t = (p / p.sum(axis=1, keepdims=True) for p in (theta, t))
    outputs = generate([[i] for i in range(9)], chains=(theta, t), call={"max_tokens": 30})
    for output, sequence in zip(outputs, tokens(outputs), strict=True):
        for token, alpha, weight in zip(sequence, output.alpha_history, output.importance_weights, strict=True):
            assert token != 4
            assert token != 7 or alpha == 0  # where no α balances the divergences, q* is one of the models itself
            assert token != 0 or (alpha == 1 and weight == 0)
            assert math.isfinite(weight)


# ---- diagnostics and statistics -------------------------------------------------------------------------------------


def test_diagnostics_and_their_summaries():
    (output,) = generate([[1]], call={"return_diagnostics": True})
    names = [
        "kl_theta",
        "kl_t",
        "kl_diff",
        "ess_theta",
        "ess_t",
        "ess_ratio",
        "entropy_q",
        "coverage_theta",
        "coverage_t",
    ]
    for name in names:
        values = output.diagnostics[name]
        assert len(values) == 6
        assert output.diagnostics[f"{name}_mean"] == pytest.approx(np.mean(values))
        assert output.diagnostics[f"{name}_max"] == max(values)
    assert output.diagnostics["kl_diff_max"] < 1e-9
    np.testing.assert_allclose(output.diagnostics["coverage_theta"], 1)
    assert generate([[1]])[0].diagnostics == {}


def test_statistics_add_up():
    async def run() -> None:
        async with coordinator() as opened:
            await opened.generate_batch([[1], [2], [3]], max_tokens=4)
            await opened.generate_batch([[1]], max_tokens=2)
            stats = opened.stats
            assert stats.decoding.tokens == 14
            assert stats.seconds > 0 and stats.tokens_per_second == pytest.approx(14 / stats.seconds)
            assert stats.retries == 0
            assert stats.theta.requests > 0 and stats.theta.bytes_received > stats.theta.requests

    asyncio.run(asyncio.wait_for(run(), HANG))


# ---- streaming ------------------------------------------------------------------------------------------------------


def stream(prompt: Any, *, call: dict[str, Any] | None = None, **options: Any) -> list[StreamChunk]:
    async def run() -> list[StreamChunk]:
        async with coordinator(**options) as opened:
            return [chunk async for chunk in opened.generate_stream(prompt, **{"max_tokens": 12, **(call or {})})]

    return asyncio.run(asyncio.wait_for(run(), HANG))


@pytest.mark.parametrize("options", SUPPORTS[:2], ids=str)
def test_streaming_equals_the_batch(options):
    (output,) = generate([[1]], call={"max_tokens": 12}, **options)
    chunks = stream([1], **options)
    assert [chunk.token_id for chunk in chunks] == output.generated_tokens
    assert [chunk.alpha for chunk in chunks] == output.alpha_history
    np.testing.assert_allclose([chunk.logprob_q for chunk in chunks], output.logprobs_q)
    weights = np.array([chunk.importance_weight for chunk in chunks])
    known = ~np.isnan(weights)
    assert known.all() or options
    np.testing.assert_allclose(weights[known], np.array(output.importance_weights)[known])
    assert [chunk.finish_reason for chunk in chunks] == [None] * 11 + ["length"]


def test_streamed_text_is_the_batchs_text():
    """Random bytes: characters split over tokens, invalid ones, and one that is unfinished at the end."""
    tokenizer = make_tokenizer()
    chains = tuple(random_chain(np.random.default_rng(seed), len(tokenizer), 1.0) for seed in (3, 4))
    for seed in range(6):
        options = {"chains": chains, "tokenizer": tokenizer, "top_k": 50, "seed": seed, "ignore_eos": True}
        (output,) = generate(["the "], call={"max_tokens": 20}, **options)
        chunks = stream("the ", call={"max_tokens": 20}, **options)
        assert [chunk.token_id for chunk in chunks] == output.generated_tokens
        assert "".join(chunk.text for chunk in chunks) == output.generated_text


def test_a_stream_can_be_left_early():
    async def run() -> int:
        async with coordinator() as opened:
            chunks = opened.generate_stream([1], max_tokens=1000)
            async for _ in chunks:
                break
            await chunks.aclose()
            return len((await opened.generate_batch([[2]], max_tokens=3))[0].generated_tokens)

    assert asyncio.run(asyncio.wait_for(run(), HANG)) == 3


@pytest.mark.parametrize("prompt", [[], [-1], 7], ids=str)
def test_a_stream_of_a_bad_prompt_is_a_value_error(prompt):
    with pytest.raises(ValueError, match="prompt"):
        stream(prompt)


def test_a_stream_of_a_refused_prompt_raises_the_servers_words():
    with pytest.raises(DualRolloutError, match="out of vocabulary"):
        stream([V + 5])


# ---- the one-call form ----------------------------------------------------------------------------------------------


def test_one_call_equals_the_coordinator():
    async def run() -> list[GenerationOutput]:
        async with MarkovServer(THETA).running() as theta, MarkovServer(T).running() as t:
            config = CoordinatorConfig(theta_url=theta.url, t_url=t.url, top_k=V, seed=5)
            return await generate_with_optimal_sampling([[1], [2]], config, max_tokens=6)

    assert tokens(asyncio.run(asyncio.wait_for(run(), HANG))) == tokens(generate([[1], [2]]))


# ---- versions of the weights ----------------------------------------------------------------------------------------


def test_a_sequence_mixes_no_weights(tiny_pair: TinyPair) -> None:
    async def run() -> None:
        config = CoordinatorConfig(theta_url=tiny_pair.theta_url, t_url=tiny_pair.t_url, top_k=20, ignore_eos=True)
        async with DualVLLMCoordinator(config) as coordinator:
            coordinator.weight_version = 1
            task = asyncio.create_task(coordinator.generate_batch(["the", "and so"], max_tokens=24))
            while coordinator.stats.decoding.tokens < 6:
                await asyncio.sleep(0.001)
            coordinator.weight_version = 2
            assert all("from version 1 to 2" in str(output.error) for output in await task)
            (output,) = await coordinator.generate_batch(["the"], max_tokens=3)
            assert output.error is None and output.weight_versions == [2] * 3

    asyncio.run(asyncio.wait_for(run(), HANG))


# ---- bad requests first, tokens that cannot be decoded --------------------------------------------------------------


@pytest.mark.parametrize("bad", [1, 2, 5])
def test_servers_are_checked_however_many_prompts_are_bad_before(
    tiny_pair: TinyPair, bad: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `max_concurrency` 2 the first ones may all be bad; then come good ones, for servers with a lower cap."""
    prompts: list[Any] = [*[None, []] * 3][:bad] + ["the"] * 3

    checked: list[int] = []

    async def counted(theta: Any, t: Any, config: Any, contexts: Sequence[Any], *args: Any, **options: Any) -> Any:
        checked.append(len(contexts))
        return await check_servers(theta, t, config, contexts, *args, **options)

    monkeypatch.setattr(two_servers, "check_servers", counted)

    async def run() -> None:
        config = CoordinatorConfig(theta_url=tiny_pair.theta_url, t_url=tiny_pair.t_url, top_k=20, max_concurrency=2)
        async with DualVLLMCoordinator(config) as coordinator:
            requests = (GenerationRequest(i, prompt) for i, prompt in enumerate(prompts))
            outputs = dict([item async for item in coordinator.generate_iter(requests, max_tokens=2)])
            assert [outputs[i].error is None for i in range(len(prompts))] == [False] * bad + [True] * 3

    asyncio.run(asyncio.wait_for(run(), HANG))
    assert len(checked) == 1


def test_prompts_of_the_first_batch_are_counted_once(tiny_pair: TinyPair) -> None:
    async def run() -> None:
        config = CoordinatorConfig(
            theta_url=tiny_pair.theta_url, t_url=tiny_pair.t_url, top_k=20, long_prompts="truncate_left"
        )
        async with DualVLLMCoordinator(config) as coordinator:
            requests = [GenerationRequest(i, "the <|im_end|> " * 100) for i in range(3)]
            async for _, output in coordinator.generate_iter(requests, max_tokens=2):
                assert output.error is None
            assert (coordinator.stats.truncated_prompts, coordinator.stats.special_names) == (3, 3)

    asyncio.run(asyncio.wait_for(run(), HANG))


def test_tokens_that_cannot_be_decoded_fail_alone(tiny_pair: TinyPair) -> None:
    class Picky:
        """Raises as the real ones do for ids beyond 32 bits."""

        def __init__(self, tokenizer: Any):
            self._tokenizer, self.eos_token_id, self.most = tokenizer, None, 2

        def __getattr__(self, name: str) -> Any:
            return getattr(self._tokenizer, name)

        def decode(self, ids: list[int], **options: Any) -> str:
            if len(ids) > self.most:
                raise OverflowError("out of range integral type conversion attempted")
            return self._tokenizer.decode(ids, **options)

    async def run() -> None:
        config = CoordinatorConfig(theta_url=tiny_pair.theta_url, t_url=tiny_pair.t_url, top_k=20, seed=0)
        tokenizer: Any = Picky(make_tokenizer())
        async with DualVLLMCoordinator(config, tokenizer=tokenizer) as coordinator:
            (output,) = await coordinator.generate_batch([[5, 6]], max_tokens=3)
            assert "cannot decode" in str(output.error) and output.finish_reason is None
            assert len(output.generated_tokens) == 3
            requests = [GenerationRequest(i, [5, 6]) for i in range(2)]
            errors = [output.error async for _, output in coordinator.generate_iter(requests, max_tokens=3)]
            assert all("cannot decode" in str(error) for error in errors)
            assert (await coordinator.generate_batch([[5, 6]], max_tokens=2))[0].error is None
            tokenizer.most = 0
            with pytest.raises(ValueError, match="cannot decode"):
                async for _ in coordinator.generate_stream([5, 6], max_tokens=3):
                    pass

    asyncio.run(asyncio.wait_for(run(), HANG))
