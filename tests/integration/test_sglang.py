"""The SGLang client against a stub with SGLang's recorded shapes, alone and inside the coordinator.

What a rollout must be drawn from is enumerated in test_coordinator_distribution.py. Each χ² test fails for a correct
program with probability 1e-4; seeds are fixed, so an outcome does not change from run to run.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import math
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from dual_rollout import CoordinatorConfig, DualVLLMCoordinator, GenerationOutput
from dual_rollout.coordinator import CoordinatorStats
from dual_rollout.exceptions import (
    EngineError,
    EngineProtocolError,
    EngineRejectedError,
    EngineUnavailableError,
)
from dual_rollout.functional.top_k import NO_TOKEN
from dual_rollout.servers import HttpTransport, SGLangEngine, retry
from tests.chi_square import chi_square_p_value
from tests.exact_distribution import tempered
from tests.hang import HANG
from tests.integration.test_coordinator_distribution import (
    FALSE_ALARM,
    START,
    THETA,
    Case,
    T,
    V,
    exact_position,
    sequence_probabilities,
)
from tests.markov_server import MarkovServer
from tests.sglang_stub import SGLangStub, markov

PROMPTS = [[1, 2], [3, 4, 5], [0]]


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_FIRST_PAUSE_S", 0.01)


def with_engine(
    stub: SGLangStub, use: Callable[[SGLangEngine], Awaitable[Any]], model: str | None = None, **options: Any
) -> Any:
    async def run() -> Any:
        async with stub.running():
            engine = SGLangEngine(HttpTransport(stub.url, **{"max_retries": 0, **options}), model)
            try:
                return await use(engine)
            finally:
                await engine.aclose()

    return asyncio.run(asyncio.wait_for(run(), HANG))


def theta_stub(**options: Any) -> SGLangStub:
    return SGLangStub(markov(THETA), **options)


# ---- the coordinator ------------------------------------------------------------------------------------------------

UNION = Case("union-3", {"top_k": 3}, sequences=600)
TAIL = Case("tail-2", {"top_k": 2, "support": "tail"}, sequences=400)
HOT = Case("hot-tail-3-exact", {"top_k": 3, "support": "tail", "missing": "exact", "temperature": 1.5}, sequences=400)
BLOCK = Case("block-3", {"top_k": 3, "decoding": "block", "num_draft_tokens": 2}, sequences=600)
BLOCK_TAIL = Case(
    "block-hot-tail-3",
    {"top_k": 3, "support": "tail", "temperature": 1.5, "decoding": "block", "num_draft_tokens": 2},
    sequences=400,
)
COLD = Case("cold-3", {"top_k": 3, "temperature": 0.7}, sequences=600)
# Where log-probabilities are raw, lists of all there is make a temperature exact.
RAW = Case("cold-all-raw", {"top_k": V, "temperature": 0.7}, sequences=400, server={"original_logprobs": True})
BOTH, T_ONLY, THETA_ONLY = ("sglang", "sglang"), ("vllm", "sglang"), ("sglang", "vllm")
RUNS = [
    *((case, BOTH) for case in (UNION, TAIL, HOT, COLD, RAW, BLOCK, BLOCK_TAIL)),
    *((case, T_ONLY) for case in (UNION, HOT)),
    *((case, THETA_ONLY) for case in (UNION, BLOCK)),
]
by_run = pytest.mark.parametrize(("case", "engines"), RUNS, ids=lambda value: str(value).replace("'", ""))


def server(engine: str, chain: np.ndarray, case: Case) -> Any:
    return MarkovServer(chain, processed=True) if engine == "vllm" else SGLangStub(markov(chain), **case.server)


@functools.cache
def rollouts(case: Case, engines: tuple[str, str]) -> tuple[list[GenerationOutput], CoordinatorStats]:
    async def run() -> tuple[list[GenerationOutput], CoordinatorStats]:
        async with contextlib.AsyncExitStack() as stack:
            theta, t = [
                await stack.enter_async_context(server(engine, chain, case).running())
                for engine, chain in zip(engines, (THETA, T), strict=True)
            ]
            config = CoordinatorConfig(
                theta_url=theta.url,
                t_url=t.url,
                theta_engine=engines[0],
                t_engine=engines[1],
                **{"decoding": "lockstep", "seed": 11, "max_concurrency": 1000, **case.options},
            )
            coordinator = await stack.enter_async_context(DualVLLMCoordinator(config))
            outputs = await coordinator.generate_batch([[START]] * case.sequences, max_tokens=case.tokens)
            return outputs, coordinator.stats

    outputs, stats = asyncio.run(asyncio.wait_for(run(), HANG))
    assert [output.error for output in outputs] == [None] * case.sequences
    return outputs, stats


@by_run
def test_frequencies_of_sequences(case, engines):
    distribution = sequence_probabilities(lambda last: exact_position(case, last)[1], case.tokens)
    drawn = [tuple(output.generated_tokens) for output in rollouts(case, engines)[0]]
    observed = np.array([drawn.count(sequence) for sequence in distribution])
    assert observed.sum() == case.sequences
    assert chi_square_p_value(observed, case.sequences * np.array(list(distribution.values()))) > FALSE_ALARM


@by_run
def test_the_record_is_exact(case, engines):
    """α, log q*, log π_θ, log π_t and the weight of every token, whether a list held it or not."""
    got, exact = [], []
    for output in rollouts(case, engines)[0]:
        got += zip(
            output.alpha_history,
            output.logprobs_q,
            output.logprobs_theta,
            output.logprobs_t,
            np.log(output.importance_weights),
            strict=True,
        )
        exact += [exact_record(case, *pair) for pair in itertools.pairwise([START, *output.generated_tokens])]
    np.testing.assert_allclose(got, exact, atol=1e-6)


@functools.cache
def exact_record(case: Case, last: int, token: int) -> tuple[float, ...]:
    alpha, q = exact_position(case, last)
    temperature = case.options.get("temperature", 1.0)
    log_q = math.log(q[token])
    log_theta, log_t = (math.log(tempered(chain[last], temperature)[token]) for chain in (THETA, T))
    return alpha, log_q, log_theta, log_t, log_theta - log_q


def test_one_bad_prompt_fails_alone():
    async def run() -> list[GenerationOutput]:
        async with theta_stub().running() as theta, SGLangStub(markov(T)).running() as t:
            config = CoordinatorConfig(
                theta_url=theta.url, t_url=t.url, theta_engine="sglang", t_engine="sglang", top_k=V, seed=0
            )
            async with DualVLLMCoordinator(config) as coordinator:
                await coordinator.theta.describe()
                theta.max_req_input_len = 8  # after the client has been told 4096
                return await coordinator.generate_batch([[1], [2] * 20, [3]], max_tokens=2)

    outputs = asyncio.run(asyncio.wait_for(run(), HANG))
    assert [output.error is None for output in outputs] == [True, False, True]
    assert "exceeds the maximum allowed length" in outputs[1].error


def test_a_prompt_beyond_the_context_is_never_sent():
    async def run() -> tuple[list[GenerationOutput], int]:
        async with theta_stub(max_req_input_len=11).running() as theta, SGLangStub(markov(T)).running() as t:
            config = CoordinatorConfig(
                theta_url=theta.url, t_url=t.url, theta_engine="sglang", t_engine="sglang", top_k=2, seed=0
            )
            async with DualVLLMCoordinator(config) as coordinator:
                outputs = await coordinator.generate_batch([[1] * 6, [1] * 7], max_tokens=3)
            return outputs, max(len(ids) for payload in theta.requests for ids in payload["input_ids"])

    outputs, longest = asyncio.run(asyncio.wait_for(run(), HANG))
    assert [output.error is None for output in outputs] == [True, False]
    assert longest < 11


# ---- the engine -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old_routes", [False, True])
def test_describe(old_routes):
    stub = theta_stub(max_req_input_len=100, old_routes=old_routes)
    info = with_engine(stub, lambda engine: engine.describe())
    assert (info.model, info.root, info.max_model_len) == ("models/chain", "models/tokenizer", 99)


def test_a_server_that_is_not_sglang_is_named():
    async def run() -> None:
        async with MarkovServer(THETA).running() as vllm:
            engine = SGLangEngine(HttpTransport(vllm.url, max_retries=0))
            try:
                await engine.describe()
            finally:
                await engine.aclose()

    with pytest.raises(EngineRejectedError, match="theta_engine"):
        asyncio.run(asyncio.wait_for(run(), HANG))


def test_a_name_that_is_not_served_is_refused():
    with pytest.raises(EngineRejectedError, match="leave theta_model/t_model unset"):
        with_engine(theta_stub(), lambda engine: engine.describe(), model="other")


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
@pytest.mark.parametrize("original", [False, True])
def test_lists_hold_the_k_most_likely_and_never_the_sampled_token(temperature, original):
    """64 requests sample tokens inside and outside the list; the list does not move."""
    k = V if original else 3

    async def use(engine: SGLangEngine) -> list[Any]:
        return [await engine.next_top_k(PROMPTS, k, temperature) for _ in range(64)]

    tops = with_engine(theta_stub(original_logprobs=original), use)
    for row, prompt in enumerate(PROMPTS):
        distribution = tempered(THETA[prompt[-1]], temperature)
        best = np.argsort(-distribution)[:k]
        for top in tops:
            assert top.token_ids.shape == top.logprobs.shape == (3, k)
            assert sorted(top.token_ids[row].tolist()) == sorted(best.tolist())
            np.testing.assert_allclose(np.exp(top.logprobs[row]), distribution[top.token_ids[row]], rtol=1e-9)


def test_a_batch_is_one_request_of_token_ids():
    stub = theta_stub()
    with_engine(stub, lambda engine: engine.next_top_k(PROMPTS, 3))
    (payload,) = stub.requests
    assert payload["input_ids"] == PROMPTS
    assert payload["return_text_in_logprobs"] is False and payload["sampling_params"]["temperature"] == 1.0
    assert "seed" not in str(payload)  # one seed for a list would tie its prompts together


def test_impossible_tokens_are_no_candidates():
    chain = np.array([[0.75, 0.25, 0.0, 0.0]] * 4)
    top = with_engine(SGLangStub(markov(chain)), lambda engine: engine.next_top_k([[0]], 3))
    assert top.token_ids.tolist() == [[0, 1, NO_TOKEN]]
    np.testing.assert_allclose(np.exp(top.logprobs), [[0.75, 0.25, 0.0]])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_drafts_have_the_models_distribution_and_its_lists(temperature):
    """Also, a χ² test at the rate above: drafts of one length, from one context."""
    count, length, eos = 500, 2, 8
    stub = theta_stub(eos=eos)
    drafts = with_engine(
        stub,
        lambda engine: engine.draft([[2, START]] * count, [length] * count, 3, temperature, list(range(count))),
    )
    assert len(stub.requests) == (1 if temperature == 1.0 else 3)  # the other two measure
    distribution, rows = {}, iter(zip(drafts.lists.token_ids, drafts.lists.logprobs, strict=True))
    for first, second in itertools.product(range(V), repeat=2):
        p, r = (tempered(THETA[last], temperature) for last in (START, first))
        distribution[(first, second) if first != eos else (first,)] = p[first] * (r[second] if first != eos else 1.0)
    drawn = [tuple(draft.tolist()) for draft in drafts.token_ids]
    for last, (ids, logprobs) in zip((last for draft in drawn for last in (START, *draft[:-1])), rows, strict=True):
        p = tempered(THETA[last], temperature)
        assert set(ids.tolist()) == set(np.argsort(-p)[:3].tolist())
        np.testing.assert_allclose(np.exp(logprobs), p[ids], rtol=1e-9)
    observed = np.array([drawn.count(draft) for draft in distribution])
    assert observed.sum() == count
    assert chi_square_p_value(observed, count * np.array(list(distribution.values()))) > FALSE_ALARM


def test_drafts_repeat_with_their_seeds():
    async def use(engine: SGLangEngine) -> list[list[list[int]]]:
        runs = [await engine.draft(PROMPTS, [4, 3, 5], 2, 1.0, seeds) for seeds in ([1, 2, 3], [1, 2, 3], [4, 5, 6])]
        return [[draft.tolist() for draft in run.token_ids] for run in runs]

    first, second, third = with_engine(theta_stub(), use)
    assert [len(draft) for draft in first] == [4, 3, 5]
    assert first == second != third


def test_lists_of_drafts_are_at_the_temperature_where_they_hold_all_the_mass():
    drafts = with_engine(
        theta_stub(original_logprobs=True), lambda engine: engine.draft(PROMPTS, [1] * 3, V, 0.5, [1] * 3)
    )
    for prompt, ids, logprobs in zip(PROMPTS, drafts.lists.token_ids, drafts.lists.logprobs, strict=True):
        np.testing.assert_allclose(np.exp(logprobs), tempered(THETA[prompt[-1]], 0.5)[ids], rtol=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_drafts_are_scored_in_one_request(temperature):
    drafts = [np.array(tokens) for tokens in ([3, 8, 0], [6], [2, 2])]
    stub = theta_stub()
    top = with_engine(stub, lambda engine: engine.score_drafts(PROMPTS, drafts, 3, temperature, "token_ids"))
    before = [last for prompt, draft in zip(PROMPTS, drafts, strict=True) for last in (prompt[-1], *draft[:-1])]
    assert top.token_ids.shape == top.logprobs.shape == (6, 3)
    for last, ids, logprobs in zip(before, top.token_ids, top.logprobs, strict=True):
        p = tempered(THETA[last], temperature)
        assert set(ids.tolist()) == set(np.argsort(-p)[:3].tolist())
        np.testing.assert_allclose(np.exp(logprobs), p[ids], rtol=1e-9)
    if temperature == 1.0:
        (payload,) = stub.requests
        assert payload["logprob_start_len"] == [1, 2, 0]  # all before is read from the prefix cache


@pytest.mark.parametrize("original", [False, True])
def test_probe(original):
    stub = theta_stub(original_logprobs=original, enable_lora=True)

    async def use(engine: SGLangEngine) -> Any:
        await engine.health()
        await engine.reset_prefix_cache()
        assert await engine.detokenize([1, 7]) == "<1> <7>"
        return [await engine.probe([1, 2, 3]) for _ in range(2)], len(stub.requests)

    (first, second), requests = with_engine(stub, use)
    assert first is second and requests <= 7, "five for what it can do, the others for what it is"
    assert first.logprobs_mode == ("raw" if original else "processed")
    assert (first.scoring[0], first.cached_rows, first.loads_lora) == ("token_ids", True, True)
    assert (first.model, first.version, first.max_logprobs) == ("models/chain", "0.5.9", None)


def test_drafts_are_scored_by_prefix_where_rows_are_shifted(caplog):
    stub = theta_stub()

    def shift(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Each row of the prompt is that of one token later."""
        for meta in (answer["meta_info"] for answer in answers):
            if len(meta.get("input_top_logprobs", [])) > 1:
                meta["input_top_logprobs"] = [None, *meta["input_top_logprobs"][2:], *meta["output_top_logprobs"]]
        return answers

    stub.alter = shift

    async def use(engine: SGLangEngine) -> Any:
        capabilities = await engine.probe([1, 2])
        (method,) = capabilities.scoring
        return capabilities, await engine.score_drafts([[1]], [np.array([2, 3])], 3, 1.0, method)

    capabilities, top = with_engine(stub, use)
    assert (capabilities.scoring, capabilities.cached_rows) == (("prefixes",), False)
    assert "scored by prefix" in caplog.text
    for row, last in enumerate((1, 2)):
        np.testing.assert_allclose(np.exp(top.logprobs[row]), THETA[last][top.token_ids[row]], rtol=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_named_logprobs(temperature):
    names = [[8, 0], [2], [5, 1, 7]]
    stub = theta_stub()
    values = with_engine(stub, lambda engine: engine.named_logprobs(PROMPTS, names, temperature))
    for prompt, ids, logprobs in zip(PROMPTS, names, values, strict=True):
        np.testing.assert_allclose(np.exp(logprobs), tempered(THETA[prompt[-1]], temperature)[ids], rtol=1e-9)
    assert stub.requests[-1]["token_ids_logprob"] == names  # all prompts in one request


def test_named_logprobs_at_a_temperature_need_processed_ones():
    with pytest.raises(EngineRejectedError, match="SGLANG_RETURN_ORIGINAL_LOGPROB"):
        with_engine(theta_stub(original_logprobs=True), lambda engine: engine.named_logprobs(PROMPTS, [[1]] * 3, 0.5))


@pytest.mark.parametrize("start", [1, 2, 5])
def test_score_is_aligned_past_the_null_row(start):
    """Token 8, the last id, is written as 0 by SGLang."""
    text = [4, 8, 8, 1, 0, 6]
    stub = theta_stub()
    own, top = with_engine(stub, lambda engine: engine.score(text, start))
    pairs = list(itertools.pairwise(text))[start - 1 :]
    np.testing.assert_allclose(np.exp(own), [THETA[before, token] for before, token in pairs], rtol=1e-9)
    np.testing.assert_allclose(np.exp(top), [THETA[before].max() for before, _ in pairs], rtol=1e-9)
    assert stub.requests[-1]["logprob_start_len"] == start - 1  # the row there is null, those before are cached


def test_score_of_an_older_version_without_the_null_row():
    text = [4, 8, 3, 1]
    stub = theta_stub()

    def drop_null(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for name in ("input_token_logprobs", "input_top_logprobs"):
            del answers[0]["meta_info"][name][0]
        return answers

    stub.alter = drop_null
    own, _ = with_engine(stub, lambda engine: engine.score(text, 2))
    np.testing.assert_allclose(np.exp(own), [THETA[8, 3], THETA[3, 1]], rtol=1e-9)


@pytest.mark.parametrize("start", [0, 4])
def test_score_of_nothing_is_the_callers_mistake(start):
    with pytest.raises(ValueError, match=r"start must be in 1\.\.3"):
        with_engine(theta_stub(), lambda engine: engine.score([1, 2, 3, 4], start))


def test_draw_excluding_has_the_conditional_distribution():
    excluded, temperature = [0, 4, 7], 0.8

    async def use(engine: SGLangEngine) -> list[int]:
        return await engine.draw_excluding([[3, 5]] * 600, [excluded] * 600, temperature, range(600))

    drawn = with_engine(theta_stub(), use)
    distribution = tempered(THETA[5], temperature)
    distribution[excluded] = 0
    observed = np.bincount(drawn, minlength=V)
    assert chi_square_p_value(observed, 600 * distribution / distribution.sum()) > FALSE_ALARM


@pytest.mark.parametrize("deterministic", [True, False])
def test_seeds_are_sent_where_they_count(deterministic, caplog):
    stub = theta_stub(deterministic=deterministic)

    async def use(engine: SGLangEngine) -> list[list[int]]:
        return [await engine.draw_excluding([[2]] * 20, [[0]] * 20, 1.0, range(20)) for _ in range(2)]

    first, second = with_engine(stub, use)
    assert (first == second) == deterministic
    assert all(("sampling_seed" in payload["sampling_params"]) == deterministic for payload in stub.requests)
    assert caplog.text.count("--enable-deterministic-inference") == (0 if deterministic else 1)


# ---- weights --------------------------------------------------------------------------------------------------------


def load_t(path: str) -> Any:
    if path != "/models/t":
        raise FileNotFoundError(f"Cannot find any model weights with `{path}`")
    return markov(T)


def first_distribution(engine: SGLangEngine) -> Awaitable[Any]:
    return engine.named_logprobs([[START]], [list(range(V))])


def test_reload_weights():
    async def use(engine: SGLangEngine) -> list[np.ndarray]:
        (before,) = await first_distribution(engine)
        with pytest.raises(EngineRejectedError, match=r"dual_weight_sync_dir.*Cannot find any model weights"):
            await engine.reload_weights("/nowhere")
        (refused,) = await first_distribution(engine)
        await engine.reload_weights("/models/t")
        (after,) = await first_distribution(engine)
        return [before, refused, after]

    stub = theta_stub(load=load_t)
    before, refused, after = with_engine(stub, use)
    np.testing.assert_allclose(np.exp(before), THETA[START])
    np.testing.assert_allclose(refused, before)
    np.testing.assert_allclose(np.exp(after), T[START])
    assert stub.calls[-1] == ("/update_weights_from_disk", {"model_path": "/models/t", "flush_cache": True})


def test_lora_adapters_replace_each_other():
    async def use(engine: SGLangEngine) -> list[Any]:
        loads = await engine.loads_lora()
        await engine.load_lora("policy", "/models/t")
        await engine.load_lora("policy", "/models/t")
        (base,) = await first_distribution(engine)
        engine.use_lora("policy")
        (adapted,) = await first_distribution(engine)
        return [loads, base, adapted]

    loads, base, adapted = with_engine(theta_stub(enable_lora=True, load=load_t), use)
    assert loads
    np.testing.assert_allclose(np.exp(base), THETA[START])
    np.testing.assert_allclose(np.exp(adapted), T[START])


def test_an_adapter_can_be_the_model():
    async def use(engine: SGLangEngine) -> np.ndarray:
        return (await first_distribution(engine))[0]

    stub = theta_stub(enable_lora=True)
    stub.adapters["teacher"] = markov(T)
    np.testing.assert_allclose(np.exp(with_engine(stub, use, model="teacher")), T[START])


def test_without_lora_the_flag_is_named():
    async def use(engine: SGLangEngine) -> None:
        assert not await engine.loads_lora()
        await engine.load_lora("policy", "/models/t")

    with pytest.raises(EngineRejectedError, match="--enable-lora"):
        with_engine(theta_stub(load=load_t), use)


# ---- faults ---------------------------------------------------------------------------------------------------------


def spoil_top(change: Callable[[list[Any]], Any]) -> Callable[[list[dict[str, Any]]], Any]:
    """Change the second answer's list of triples."""

    def alter(answers: list[dict[str, Any]]) -> Any:
        meta = answers[1]["meta_info"]
        meta["output_top_logprobs"] = [change(meta["output_top_logprobs"][0])]
        return answers

    return alter


def without_meta_info(answers: list[dict[str, Any]]) -> Any:
    del answers[1]["meta_info"]
    return answers


def without_lists(answers: list[dict[str, Any]]) -> Any:
    del answers[1]["meta_info"]["output_top_logprobs"]
    return answers


@pytest.mark.parametrize(
    "alter",
    [
        lambda answers: answers[0],
        lambda answers: answers[:-1],
        lambda answers: None,
        without_meta_info,
        without_lists,
        spoil_top(lambda row: None),
        spoil_top(lambda row: []),
        spoil_top(lambda row: row[:-1]),
        spoil_top(lambda row: [entry[:2] for entry in row]),
        spoil_top(lambda row: [[None, entry[1], None] for entry in row]),
        spoil_top(lambda row: [[entry[0], None, None] for entry in row]),
        spoil_top(lambda row: [[0.5, entry[1], None] for entry in row]),
        spoil_top(lambda row: [["-0.5x", entry[1], None] for entry in row]),
        spoil_top(lambda row: [[entry[0], 10**30, None] for entry in row]),
        spoil_top(lambda row: [row[0]] * len(row)),
        spoil_top(lambda row: [[-0.1, entry[1], None] for entry in row]),
        spoil_top(lambda row: [row[0], *([-9999.0, entry[1], None] for entry in row[1:])]),
        spoil_top(lambda row: 3),
    ],
)
def test_answers_of_another_shape_are_protocol_errors(alter):
    stub = theta_stub()
    stub.alter = alter
    with pytest.raises(EngineProtocolError) as caught:
        with_engine(stub, lambda engine: engine.next_top_k(PROMPTS, 3))
    assert str(caught.value).startswith(stub.url)


def test_an_answer_that_is_invalid_once_is_asked_for_again():
    """A duplicate of the first answer, an abort, and an internal error; each time the second answer is right."""
    stub, expected = theta_stub(), with_engine(theta_stub(), lambda engine: engine.next_top_k(PROMPTS, 3))
    first: list[Any] = []

    def alter(answers: list[dict[str, Any]]) -> Any:
        if not first:
            first.append(answers)
        elif len(stub.requests) == 2:
            return first[0]
        elif len(stub.requests) == 4:
            answers[0]["meta_info"]["finish_reason"] = {"type": "abort", "message": "paused"}
        return answers

    async def use(engine: SGLangEngine) -> None:
        await engine.next_top_k([[2], [3], [4]], 3)
        for count in (3, 5, 6):
            if count == 6:
                stub.failures = [(500, {"message": "crashed"})]
            top = await engine.next_top_k(PROMPTS, 3)
            np.testing.assert_array_equal(top.token_ids, expected.token_ids)
            np.testing.assert_array_equal(top.logprobs, expected.logprobs)
            assert len(stub.requests) == count + (count == 6)

    stub.alter = alter
    with_engine(stub, use, max_retries=1)


@pytest.mark.parametrize("limit", ["x", 1.5, -3, True, [1]])
def test_a_limit_that_is_none_is_a_protocol_error(limit: Any):
    with pytest.raises(EngineProtocolError, match="max_req_input_len"):
        with_engine(theta_stub(max_req_input_len=limit), lambda engine: engine.describe())


def test_texts_in_the_triples_do_no_harm():
    stub = theta_stub()
    stub.alter = spoil_top(lambda row: [[value, token, " 7"] for value, token, _ in row])
    top = with_engine(stub, lambda engine: engine.next_top_k(PROMPTS, 3))
    np.testing.assert_allclose(np.exp(top.logprobs[1]), np.sort(THETA[5])[::-1][:3])


def test_scores_of_other_tokens_are_protocol_errors():
    stub = theta_stub()

    def alter(answers: list[dict[str, Any]]) -> Any:
        answers[0]["meta_info"]["input_token_logprobs"].reverse()
        return answers

    stub.alter = alter
    with pytest.raises(EngineProtocolError):
        with_engine(stub, lambda engine: engine.score([4, 8, 3, 1], 1))


def test_an_abort_is_no_answer():
    stub = theta_stub()

    def alter(answers: list[dict[str, Any]]) -> Any:
        answers[2]["meta_info"]["finish_reason"] = {"type": "abort", "message": "Abort in waiting queue"}
        return answers

    stub.alter = alter
    with pytest.raises(EngineProtocolError, match="Abort in waiting queue"):
        with_engine(stub, lambda engine: engine.next_top_k(PROMPTS, 3))


OVERLOADED = {"object": "error", "message": "The request queue is full.", "type": "503", "param": None, "code": 503}
TOO_LONG = {"error": {"message": "The input (12 tokens) is longer than the model's context length (10 tokens)."}}
BAD_FIELD = {"object": "error", "message": "input_ids must be ints", "type": "Bad Request", "param": None, "code": 400}


@pytest.mark.parametrize("original", [False, True])
def test_lists_as_base64_are_those_of_the_nested_form(original: bool) -> None:
    """Of next tokens, of drafts, of scored drafts and of a text."""

    async def use(engine: SGLangEngine, binary: bool) -> list[Any]:
        assert (await engine.probe([1, 2])).refused == ()
        engine._binary &= binary
        drafts = await engine.draft(PROMPTS, [3, 1, 4], 3, 1.0, [5, 6, 7])
        lists = [
            await engine.next_top_k(PROMPTS, V),
            await engine.next_top_k(PROMPTS, 3, 1.5),
            drafts.lists,
            await engine.score_drafts(PROMPTS, drafts.token_ids, 3, 1.0, "token_ids"),
        ]
        own, top = await engine.score([1, 2, 3, 4], 1)
        return [[tokens.tolist() for tokens in drafts.token_ids], own.tolist(), top.tolist(), lists]

    stubs = [theta_stub(original_logprobs=original, binary_lists=True) for _ in range(2)]
    nested, binary = (
        with_engine(stub, functools.partial(use, binary=form)) for stub, form in zip(stubs, (False, True), strict=True)
    )
    assert nested[:3] == binary[:3]
    for one, other in zip(nested[3], binary[3], strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert one.logprobs.tolist() == other.logprobs.tolist()
        assert one.complete.tolist() == other.complete.tolist()
    assert ["return_flat_raw_top_logprobs_b64" in stub.requests[-1] for stub in stubs] == [False, True]


def test_an_older_version_is_asked_for_base64_once() -> None:
    stub = theta_stub()

    async def use(engine: SGLangEngine) -> Any:
        found = await engine.probe([1, 2])
        await engine.next_top_k(PROMPTS, 3)
        return found

    assert with_engine(stub, use).refused == ()
    assert sum("return_flat_raw_top_logprobs_b64" in request for request in stub.requests) == 1


def spoilt(change: Callable[[dict[str, Any]], None]) -> Callable[[list[dict[str, Any]]], Any]:
    """Answers whose lists in base64 are changed."""

    def alter(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for answer in answers:
            if "output_top_logprobs_shape" in answer["meta_info"]:
                change(answer["meta_info"])
        return answers

    return alter


SPOILT: dict[str, Callable[[dict[str, Any]], Any]] = {
    "cut off": lambda meta: meta.update(output_top_logprobs_val_flat_b64=meta["output_top_logprobs_val_flat_b64"][:-8]),
    "no base64": lambda meta: meta.update(output_top_logprobs_idx_flat_b64="not base64!"),
    "float64": lambda meta: meta.update(output_top_logprobs_val_flat_b64_dtype="float64"),
    "another shape": lambda meta: meta.update(output_top_logprobs_shape=[2, 2]),
    "no shape": lambda meta: meta.update(output_top_logprobs_shape=7),
    "without ids": lambda meta: meta.pop("output_top_logprobs_idx_flat_b64"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_spoilt_base64_is_a_protocol_error(how: str) -> None:
    stub = theta_stub(binary_lists=True)

    async def use(engine: SGLangEngine) -> None:
        await engine.probe([1, 2])
        stub.alter = spoilt(SPOILT[how])
        await engine.next_top_k(PROMPTS, 3)

    with pytest.raises(EngineProtocolError):
        with_engine(stub, use)


def test_a_server_whose_base64_is_wrong_is_asked_for_nested_lists(caplog: pytest.LogCaptureFixture) -> None:
    stub = theta_stub(binary_lists=True)
    stub.alter = spoilt(SPOILT["float64"])

    async def use(engine: SGLangEngine) -> Any:
        return await engine.probe([1, 2]), await engine.next_top_k(PROMPTS, 3)

    found, top = with_engine(stub, use)
    assert len(found.refused) == 1 and "float64" in found.refused[0] and "float64" in caplog.text
    assert "return_flat_raw_top_logprobs_b64" not in stub.requests[-1]
    assert top.token_ids.shape == (3, 3)


@pytest.mark.parametrize(
    ("status", "body", "error", "says"),
    [
        (400, TOO_LONG, EngineRejectedError, "is longer than the model's context length"),
        (400, BAD_FIELD, EngineRejectedError, "input_ids must be ints"),
        (503, OVERLOADED, EngineUnavailableError, "The request queue is full"),
        (500, {"object": "error", "message": "scheduler died"}, EngineProtocolError, "scheduler died"),
    ],
    ids=["too-long", "bad-field", "overloaded", "crashed"],
)
def test_errors_by_class(status: int, body: Any, error: type[EngineError], says: str):
    stub = theta_stub()
    stub.failures = [(status, body)] * 3
    with pytest.raises(error, match=says):
        with_engine(stub, lambda engine: engine.next_top_k(PROMPTS, 3))


def test_an_overloaded_server_is_asked_again():
    stub = theta_stub()
    stub.failures = [(503, OVERLOADED)]
    top = with_engine(stub, lambda engine: engine.next_top_k(PROMPTS, 3), max_retries=2)
    assert top.token_ids.shape == (3, 3) and len(stub.requests) == 2
