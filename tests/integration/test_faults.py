"""Faults between the client and real servers, in the middle of batches: survived with the tokens that an undisturbed
run gives, or reported; never a hang, never a wrong sequence."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import functools
import io
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from dual_rollout import CoordinatorConfig, DualVLLMCoordinator, GenerationOutput
from dual_rollout.server.launch import EmbeddedServer
from tests import fault_proxy
from tests.fault_proxy import Exchange, Fault, FaultProxy, changed, error
from tests.hang import HANG
from tests.integration.conftest import TinyPair
from tests.warm_servers import WarmServer

PROMPTS = [[10 + i, 20, 30 + 2 * i] for i in range(8)]
MAX_TOKENS = 8
OPTIONS: dict[str, Any] = {"top_k": 20, "seed": 3, "max_retries": 3, "request_timeout": 20.0, "ignore_eos": True}


Run = dict[str, Any]
"""Options of the config, and `targets` of the batch."""

LOCKSTEP: Run = {"decoding": "lockstep"}
BLOCK: Run = {"decoding": "block"}


async def generate(coordinator: DualVLLMCoordinator, run: Run) -> list[GenerationOutput]:
    targets = [run["targets"]] * len(PROMPTS) if "targets" in run else None
    return await coordinator.generate_batch(PROMPTS, max_tokens=MAX_TOKENS, targets=targets)


def configured(theta_url: str, t_url: str, run: Run) -> CoordinatorConfig:
    values = {**OPTIONS, **LOCKSTEP, **{name: value for name, value in run.items() if name != "targets"}}
    return CoordinatorConfig(theta_url=theta_url, t_url=t_url, **values)


def undisturbed(theta_url: str, t_url: str, run: Run = LOCKSTEP) -> list[list[int]]:
    return _undisturbed(theta_url, t_url, json.dumps(run))


@functools.cache
def _undisturbed(theta_url: str, t_url: str, run: str) -> list[list[int]]:
    async def generated() -> list[GenerationOutput]:
        async with DualVLLMCoordinator(configured(theta_url, t_url, json.loads(run))) as coordinator:
            return await generate(coordinator, json.loads(run))

    return tokens(asyncio.run(generated()))


def tokens(outputs: list[GenerationOutput]) -> list[list[int]]:
    assert [output.error for output in outputs] == [None] * len(outputs)
    return [output.generated_tokens for output in outputs]


def run_behind_proxies(
    pair: TinyPair,
    make_fault: Callable[[FaultProxy], Fault],
    when: Callable[[int], bool],
    side: str,
    run: Run = LOCKSTEP,
    **options: Any,
) -> tuple[list[GenerationOutput], DualVLLMCoordinator, FaultProxy]:
    """A batch with the fault at one server from the time that the probe is over."""

    async def generated() -> tuple[list[GenerationOutput], DualVLLMCoordinator, FaultProxy]:
        proxies = [FaultProxy(pair.theta_url), FaultProxy(pair.t_url)]
        async with proxies[0].running(), proxies[1].running():
            config = configured(proxies[0].url, proxies[1].url, {**run, **options})
            async with DualVLLMCoordinator(config) as coordinator:
                await coordinator.generate_batch(PROMPTS[:1], max_tokens=1)
                bad = proxies[0 if side == "theta" else 1]
                bad.fault, first = make_fault(bad), bad.completions
                bad.when = lambda number: when(number - first)
                return await generate(coordinator, run), coordinator, bad

    return asyncio.run(asyncio.wait_for(generated(), HANG))


# ---- changes to an answer -------------------------------------------------------------------------------------------


def lists(edit: Callable[[dict[str, float]], None]) -> Callable[[Any], None]:
    """`edit` made to the last list of an answer, wherever it is: `{"token_id:7": -0.3}`, the token's own first."""

    def change(answer: Any) -> None:
        for choice in [*answer["choices"], answer]:
            if choice.get("prompt_logprobs"):
                row = choice["prompt_logprobs"][-1]
                flat = {f"token_id:{token}": entry["logprob"] for token, entry in row.items()}
                edit(flat)
                row.clear()
                row.update({key.removeprefix("token_id:"): {"logprob": value} for key, value in flat.items()})
            elif (choice.get("logprobs") or {}).get("top_logprobs"):
                edit(choice["logprobs"]["top_logprobs"][-1])
        if answer.get("prompt_token_id_logprobs"):
            array = np.load(io.BytesIO(base64.b64decode(answer["prompt_token_id_logprobs"])))
            named = {f"token_id:{i}": value for i, value in enumerate(array[-1].tolist())}
            edit(named)
            array = np.array([*array[:, : len(named)].tolist()[:-1], list(named.values())], dtype=np.float32)
            answer["prompt_token_id_logprobs"] = encoded(array)

    return change


def encoded(array: np.ndarray) -> str:
    content = io.BytesIO()
    np.save(content, array)
    return base64.b64encode(content.getvalue()).decode()


def set_logprob(value: float) -> Callable[[Any], None]:
    return lists(lambda row: row.update({next(iter(row)): value}))


all_impossible = lists(lambda row: row.update(dict.fromkeys(row, -9999.0)))
more_than_all_the_mass = lists(lambda row: row.update(dict.fromkeys(row, -0.01)))


@lists
def fewer_candidates(row: dict[str, float]) -> None:
    for key in list(row)[1:][-3:]:
        del row[key]


def rename_first_token(name: str | None) -> Callable[[Any], None]:
    """To one that the list does not hold where `name` is None."""

    def edit(row: dict[str, float]) -> None:
        first, *others = row.items()
        free = next(f"token_id:{i}" for i in range(len(row) + 1) if f"token_id:{i}" not in row)
        row.clear()
        row.update([(name or free, first[1]), *others])

    return lists(edit)


def drop_a_choice(answer: Any) -> None:
    del answer["choices"][-1]


def number_twice(answer: Any) -> None:
    answer["choices"].append(dict(answer["choices"][0]))


def no_logprobs(answer: Any) -> None:
    answer["prompt_logprobs"] = answer["prompt_token_id_logprobs"] = None
    answer["choices"][0].update(logprobs=None, prompt_logprobs=None)


def lists_are_text(answer: Any) -> None:
    answer["prompt_logprobs"] = answer["prompt_token_id_logprobs"] = "none today"
    answer["choices"][0].update(logprobs={"top_logprobs": "none today"}, prompt_logprobs="none today")


def other_model(answer: Any) -> None:
    answer["model"] = "gpt-2"


def other_count(answer: Any) -> None:
    answer["id"] = answer["request_id"] = None
    answer["usage"]["prompt_tokens"] += 1


SURVIVED: dict[str, Callable[[FaultProxy], Fault]] = {
    "reset": lambda _: fault_proxy.reset,
    "reset in the body": lambda _: fault_proxy.reset_in_the_body,
    "half a document": lambda _: fault_proxy.half_a_document,
    "not JSON": lambda _: fault_proxy.not_json,
    "429": lambda _: error(429, **{"Retry-After": "1"}),
    "500": lambda _: error(500),
    "503": lambda _: error(503),
    "a nested error": lambda _: fault_proxy.nested_error,
    "a nested answer": lambda _: fault_proxy.nested_answer,
    "NaN": lambda _: changed(set_logprob(math.nan)),
    "minus infinity": lambda _: changed(set_logprob(-math.inf)),
    "positive": lambda _: changed(set_logprob(0.4)),
    "all impossible": lambda _: changed(all_impossible),
    "fewer candidates": lambda _: changed(fewer_candidates),
    "too much mass": lambda _: changed(more_than_all_the_mass),
    "outside the vocabulary": lambda _: changed(rename_first_token("token_id:100000")),
    "negative id": lambda _: changed(rename_first_token("token_id:-1")),
    "another id": lambda _: changed(rename_first_token(None)),
    "not an id": lambda _: changed(rename_first_token("token_id:seven")),
    "a choice lost": lambda _: changed(drop_a_choice),
    "a choice twice": lambda _: changed(number_twice),
    "no logprobs": lambda _: changed(no_logprobs),
    "lists are text": lambda _: changed(lists_are_text),
    "null": lambda _: changed(lambda answer: []),
    "another model": lambda _: changed(other_model),
    "other prompts": lambda _: changed(other_count),
    "an earlier answer": fault_proxy.earlier_answer,
}


def check_survived(pair: TinyPair, name: str, side: str, run: Run) -> None:
    """At every third request; each is asked again, and the tokens are those of an undisturbed run."""
    outputs, coordinator, proxy = run_behind_proxies(
        pair,
        lambda proxy: fault_proxy.once_each(SURVIVED[name](proxy)),
        lambda number: number % 3 == 2,
        side,
        run,
    )
    assert proxy.injected >= 2
    assert tokens(outputs) == undisturbed(pair.theta_url, pair.t_url, run)
    assert coordinator.stats.retries >= 2
    assert all(math.isfinite(value) for output in outputs for value in output.importance_weights)


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize(
    ("name", "side", "run"),
    [(name, *(("theta", BLOCK), ("t", LOCKSTEP), ("t", BLOCK))[i % 3]) for i, name in enumerate(SURVIVED)],
    ids=str,
)
def test_a_fault_now_and_then_changes_nothing(tiny_pair: TinyPair, name: str, side: str, run: Run):
    check_survived(tiny_pair, name, side, run)


NAMED: Run = {"missing": "exact", "top_k": 5}
TAIL: Run = {"support": "tail", "top_k": 3}
POLICY: Run = {"targets": "none", "top_k": 5}


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize(
    ("name", "side", "run"),
    [
        ("NaN", "t", NAMED),
        ("half a document", "t", {**NAMED, **BLOCK}),
        ("NaN", "theta", {**NAMED, **BLOCK}),
        ("lists are text", "theta", {**NAMED, **BLOCK}),
        ("minus infinity", "t", {"top_k": 3}),
        ("500", "theta", TAIL),
        ("another id", "theta", TAIL),
        ("outside the vocabulary", "theta", {**TAIL, **BLOCK}),
        ("negative id", "theta", POLICY),
        ("fewer candidates", "theta", POLICY),
        ("no logprobs", "theta", POLICY),
    ],
    ids=str,
)
def test_named_tokens_tail_draws_and_plain_generation(tiny_pair: TinyPair, name: str, side: str, run: Run):
    check_survived(tiny_pair, name, side, run)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container and key in a JSON document."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [found for key in keys for found in [(value, key), *places(value[key])]]


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("side", ["theta", "t"])
def test_whatever_is_put_in_place_of_a_part_of_an_answer(tiny_pair: TinyPair, side: str, seed: int):
    """At every second request, one part of the document is replaced by something of another kind."""
    rng = random.Random(seed)

    def mutate(answer: Any) -> None:
        container, key = rng.choice(places(answer))
        container[key] = rng.choice([None, [], {}, "junk", True, 1e300, [None], [-0.5], {"index": 0}])

    run = (BLOCK, LOCKSTEP, {**NAMED, **BLOCK}, TAIL)[seed % 4]
    outputs, _, proxy = run_behind_proxies(
        tiny_pair, lambda _: fault_proxy.once_each(changed(mutate)), lambda number: number % 2 == 1, side, run
    )
    assert proxy.injected >= 2
    assert tokens(outputs) == undisturbed(tiny_pair.theta_url, tiny_pair.t_url, run)


def test_choices_out_of_order_are_put_in_order(tiny_pair: TinyPair):
    outputs, coordinator, proxy = run_behind_proxies(
        tiny_pair, lambda _: changed(lambda answer: answer["choices"].reverse()), lambda _: True, "theta"
    )
    assert proxy.injected >= MAX_TOKENS and coordinator.stats.retries == 0
    assert tokens(outputs) == undisturbed(tiny_pair.theta_url, tiny_pair.t_url)


@pytest.mark.parametrize("run", [LOCKSTEP, BLOCK, {"decoding": "lockstep", "support": "tail"}], ids=str)
def test_a_server_that_takes_one_prompt_in_a_request(tiny_pair: TinyPair, run: Run):
    """As vLLM's Rust front end (0.32), whose words these are."""

    async def fault(exchange: Exchange) -> web.StreamResponse:
        if isinstance(json.loads(exchange.body).get("prompt", [0])[0], list):
            words = "prompt: data did not match any variant of untagged enum Prompt at line 1 column 40"
            return web.json_response({"error": {"message": words}}, status=400)
        return await fault_proxy.passed_on(exchange)

    async def generated() -> list[GenerationOutput]:
        async with (
            FaultProxy(tiny_pair.theta_url, fault).running() as one,
            FaultProxy(tiny_pair.t_url).running() as other,
            DualVLLMCoordinator(configured(one.url, other.url, run)) as coordinator,
        ):
            outputs = await generate(coordinator, run)
            of_one, of_other = [await engine.probe(PROMPTS[0]) for engine in (coordinator.theta, coordinator.t)]
        assert (of_one.prompt_lists, of_other.prompt_lists) == (False, True)
        assert "several prompts in one request" in of_one.refused[0] and not of_other.refused
        return outputs

    outputs = asyncio.run(asyncio.wait_for(generated(), HANG))
    assert tokens(outputs) == undisturbed(tiny_pair.theta_url, tiny_pair.t_url, run)


def test_a_request_that_hangs_is_given_up_and_asked_again(tiny_pair: TinyPair):
    outputs, _, proxy = run_behind_proxies(
        tiny_pair, lambda _: fault_proxy.hang, lambda number: number == 3, "t", request_timeout=3.0
    )
    assert proxy.injected == 1
    assert tokens(outputs) == undisturbed(tiny_pair.theta_url, tiny_pair.t_url)


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize(
    ("name", "run"),
    [
        *((name, LOCKSTEP) for name in ("500", "NaN", "reset", "half a document", "an earlier answer", "no logprobs")),
        *((name, BLOCK) for name in ("500", "another id", "reset")),
    ],
    ids=str,
)
def test_a_fault_that_stays_is_reported_and_nothing_hangs(tiny_pair: TinyPair, name: str, run: Run):
    first = 3 if run is LOCKSTEP else 10
    outputs, _, proxy = run_behind_proxies(
        tiny_pair, SURVIVED[name], lambda number: number > first, "theta", run, max_retries=1
    )
    reference = undisturbed(tiny_pair.theta_url, tiny_pair.t_url, run)
    for output, expected in zip(outputs, reference, strict=True):
        assert output.error is not None and proxy.url in output.error and output.finish_reason is None
        assert 0 < len(output.generated_tokens) < MAX_TOKENS
        assert output.generated_tokens == expected[: len(output.generated_tokens)]
        assert len(output.importance_weights) == len(output.logprobs_q) == len(output.generated_tokens)


MANY = [[10 + i, 20, 30] for i in range(64)]


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize("max_retries", [0, 2])
@pytest.mark.parametrize(
    ("name", "side", "run"),
    [
        *(("500", "t", LOCKSTEP), ("500", "theta", LOCKSTEP), ("500", "theta", BLOCK), ("NaN", "t", LOCKSTEP)),
        *(("503", "t", LOCKSTEP), ("503", "theta", BLOCK)),
    ],
    ids=str,
)
def test_requests_to_a_server_of_which_no_answer_is_of_use(
    tiny_pair: TinyPair, name: str, side: str, run: Run, max_retries: int
):
    """The bounds that docs/scale.md states: a list is sent 1 + max_retries times, and its halves, down to each prompt,
    once; a draft is a request of its own, and each sequence is in one half of each size. After a 503 nothing is halved.
    """

    async def generated() -> tuple[list[GenerationOutput], int]:
        async with FaultProxy(tiny_pair.theta_url).running() as theta, FaultProxy(tiny_pair.t_url).running() as t:
            config = dataclasses.replace(configured(theta.url, t.url, run), max_retries=max_retries)
            async with DualVLLMCoordinator(config) as coordinator:
                await coordinator.generate_batch(PROMPTS[:1], max_tokens=1)
                bad = theta if side == "theta" else t
                bad.fault = SURVIVED[name](bad)
                outputs = await coordinator.generate_batch(MANY, max_tokens=MAX_TOKENS)
                return outputs, bad.injected

    outputs, requests = asyncio.run(asyncio.wait_for(generated(), HANG))
    assert all(output.error is not None and not output.generated_tokens for output in outputs)
    n, sent = len(MANY), 1 + max_retries
    bounds = {
        ("503", "lockstep"): 2 * sent,  # of each group
        ("503", "block"): n * sent,
        ("500", "block"): n * (sent + math.log2(n)),
    }
    assert sent <= requests <= bounds.get((name, run["decoding"]), 2 * n - 2 + sent)


@pytest.mark.parametrize(("side", "run"), [("t", LOCKSTEP), ("theta", BLOCK), ("theta", TAIL)], ids=str)
def test_a_server_that_answers_500_for_seconds_is_waited_for(tiny_pair: TinyPair, side: str, run: Run):
    """As a proxy does while the server behind it is restarted."""
    well_again: list[float] = []

    async def fault(exchange: Exchange) -> web.StreamResponse:
        well_again[:] = well_again or [time.monotonic() + 3]
        status, content = await exchange.ask()
        if time.monotonic() < well_again[0]:
            status, content = 500, b"Internal Server Error"
        return web.Response(body=content, status=status, content_type="application/json")

    outputs, _, _ = run_behind_proxies(tiny_pair, lambda _: fault, lambda number: number > 4, side, run, max_retries=5)
    assert tokens(outputs) == undisturbed(tiny_pair.theta_url, tiny_pair.t_url, run)


@pytest.mark.parametrize("run", [LOCKSTEP, BLOCK, TAIL], ids=str)
def test_an_answer_without_end_is_dropped_and_not_asked_for_again(tiny_pair: TinyPair, run: Run):
    outputs, coordinator, proxy = run_behind_proxies(
        tiny_pair, lambda _: fault_proxy.endless, lambda _: True, "theta", run
    )
    assert all("more than" in str(output.error) and output.generated_tokens == [] for output in outputs)
    assert 1 <= proxy.injected <= len(PROMPTS) and coordinator.stats.retries == 0
    assert coordinator.stats.theta.bytes_received < 10**7


def test_a_replica_with_answers_without_end_is_replaced(tiny_pair: TinyPair):
    async def run() -> tuple[list[GenerationOutput], FaultProxy]:
        async with FaultProxy(tiny_pair.theta_url).running() as bad:
            config = configured(bad.url, tiny_pair.t_url, LOCKSTEP)
            config = dataclasses.replace(config, theta_url=[bad.url, tiny_pair.theta_url])
            async with DualVLLMCoordinator(config) as coordinator:
                await coordinator.generate_batch(PROMPTS[:2], max_tokens=1)
                bad.fault = fault_proxy.endless
                return await generate(coordinator, LOCKSTEP), bad

    outputs, bad = asyncio.run(asyncio.wait_for(run(), HANG))
    assert bad.injected >= 1
    assert tokens(outputs) == undisturbed(tiny_pair.theta_url, tiny_pair.t_url)


def test_a_prompt_that_a_server_cannot_answer_fails_alone(tiny_pair: TinyPair):
    """As when one prompt makes a model overflow: the whole list is answered with a 500."""
    poison = PROMPTS[5][:2]

    async def fault(exchange: Exchange) -> web.StreamResponse:
        status, content = await exchange.ask()
        if any(prompt[:2] == poison for prompt in exchange.prompts):
            status, content = 500, b'{"error": {"message": "Out of range float values are not JSON compliant"}}'
        return web.Response(body=content, status=status, content_type="application/json")

    outputs, _, _ = run_behind_proxies(tiny_pair, lambda _: fault, lambda _: True, "t")
    assert [output.error is not None for output in outputs] == [i == 5 for i in range(8)]
    reference = undisturbed(tiny_pair.theta_url, tiny_pair.t_url)
    assert [o.generated_tokens for o in outputs[:5]] == reference[:5]


@pytest.mark.parametrize("side", [0, 1])
def test_a_server_killed_and_started_again(tiny_pair: TinyPair, tiny_models: tuple[Path, Path], side: int):
    flags = ["--max-logprobs", "-1", "--max-model-len", "256", "--threads", "1"]
    urls = [tiny_pair.theta_url, tiny_pair.t_url]

    async def run(server: EmbeddedServer) -> list[GenerationOutput]:
        config = CoordinatorConfig(
            theta_url=urls[0], t_url=urls[1], decoding="lockstep", **{**OPTIONS, "max_retries": 20}
        )
        async with DualVLLMCoordinator(config) as coordinator:
            task = asyncio.create_task(coordinator.generate_batch(PROMPTS, max_tokens=MAX_TOKENS))
            while coordinator.stats.decoding.tokens < 2 * len(PROMPTS):
                await asyncio.sleep(0.002)
            assert server.process is not None and not task.done()
            server.process.kill()
            await asyncio.to_thread(server.process.wait)
            await asyncio.to_thread(server.start)
            outputs = await task
            assert coordinator.stats.retries > 0
            return outputs

    with WarmServer(tiny_models[side], flags) as server:
        urls[side] = server.url
        expected = undisturbed(*urls)
        outputs = asyncio.run(asyncio.wait_for(run(server), HANG))
    assert tokens(outputs) == expected


# ---- a target that goes -----------------------------------------------------------------------------------------


def run_with_a_target_that_goes(
    pair: TinyPair, back_at: int | None, **options: Any
) -> tuple[list[GenerationOutput], DualVLLMCoordinator]:
    """The target's server refuses connections from the third token on, until `back_at` tokens or seconds after."""

    async def run() -> tuple[list[GenerationOutput], DualVLLMCoordinator]:
        async with FaultProxy(pair.t_url).running() as proxy:
            values = {"decoding": "lockstep", **OPTIONS, "max_retries": 0, **options}
            config = CoordinatorConfig(theta_url=pair.theta_url, t_url=proxy.url, **values)
            async with DualVLLMCoordinator(config) as coordinator:
                task = asyncio.create_task(coordinator.generate_batch(PROMPTS, max_tokens=MAX_TOKENS))
                while coordinator.stats.decoding.tokens < 3 * len(PROMPTS):
                    await asyncio.sleep(0.001)
                await proxy.stop()
                if back_at is not None:
                    await asyncio.sleep(back_at)
                    assert not task.done()
                    await proxy.start()
                return await task, coordinator

    return asyncio.run(asyncio.wait_for(run(), HANG))


def test_going_on_without_the_target(tiny_pair: TinyPair):
    outputs, coordinator = run_with_a_target_that_goes(tiny_pair, None, on_target_failure="policy")
    reference = undisturbed(tiny_pair.theta_url, tiny_pair.t_url)
    for output, expected in zip(outputs, reference, strict=True):
        assert output.error is None and len(output.generated_tokens) == MAX_TOKENS
        with_target = output.without_target.index(True)
        assert with_target >= 3 and all(output.without_target[with_target:])
        assert output.generated_tokens[:with_target] == expected[:with_target]
        assert output.alpha_history[with_target:] == [0.0] * (MAX_TOKENS - with_target)
        assert output.importance_weights[with_target:] == [1.0] * (MAX_TOKENS - with_target)
        assert output.logprobs_q[with_target:] == output.logprobs_theta[with_target:]
        assert all(math.isnan(value) for value in output.logprobs_t[with_target:])
        assert all(value < 0 and math.isfinite(value) for value in output.logprobs_q)
    lost = sum(sum(output.without_target) for output in outputs)
    assert coordinator.stats.decoding.lost_target_tokens == lost == coordinator.stats.decoding.policy_tokens > 0


def test_waiting_for_the_target(tiny_pair: TinyPair):
    outputs, _ = run_with_a_target_that_goes(tiny_pair, 3, on_target_failure="wait")
    assert tokens(outputs) == undisturbed(tiny_pair.theta_url, tiny_pair.t_url)


def test_by_default_a_target_that_goes_is_an_error(tiny_pair: TinyPair):
    outputs, _ = run_with_a_target_that_goes(tiny_pair, None)
    assert all(output.error is not None and output.finish_reason is None for output in outputs)
