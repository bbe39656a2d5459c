"""Two requests of one vLLM engine that are one rollout: its distribution and numbers, whatever the engine does."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import urllib.error
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from dual_rollout import CoordinatorConfig, DualVLLMCoordinator, GenerationOutput
from dual_rollout.cli import main
from dual_rollout.config import AlphaRule
from dual_rollout.samplers.examination import Examination
from tests.chi_square import chi_square_p_value
from tests.documents import run_snippet, snippet, subcommands
from tests.fault_proxy import FaultProxy, changed
from tests.integration.test_doctor import report
from tests.tiny_model import make_tokenizer
from tests.unit.test_native_draw import METHODS, expected_alpha
from tests.vllm.conftest import ServerPair
from tests.vllm.pairs import (
    Pairs,
    Prompts,
    adapter_route,
    distribution_p_value,
    distributions_of,
    in_session,
    largest_errors,
    logprobs_of,
    prompts_of,
    ragged_prompts,
)
from tests.vllm.servers import (
    LORA_FLAGS,
    ON_GPU,
    VllmServer,
    metric,
)

VOCAB_SIZE = len(make_tokenizer())
TOLERANCE = 5e-5  # nats; vLLM's kernels against transformers', both in float32
NEEDS_LORA = pytest.mark.skipif(not LORA_FLAGS, reason="vLLM's LoRA kernels for GPUs take no float32")


def test_exact_with_prompts_read_in_pieces(tight: Pairs) -> None:
    """Long prompts beside short ones, and three generations of one prompt. The distribution by a chi-square test, false
    alarm one in 10,000."""
    long: Prompts = (list(range(70)), list(range(80)))
    prompts = [*prompts_of(4), (list(range(70)), [7]), ([7], list(range(70))), long, long, long]
    rollouts = tight.rollouts(prompts, [{"max_tokens": 40, "seed": i} for i in range(len(prompts))])
    assert [len(rollout["token_ids"]) for rollout in rollouts] == [40] * len(prompts)
    assert max(largest_errors(rollouts, tight.model).values()) < TOLERANCE
    assert distribution_p_value(rollouts, tight.model) > 1e-4
    restarts = sum(map(tight.fell_apart, rollouts))
    assert restarts > 0, "nothing fell out of step: the test shows too little"
    assert restarts < 36, "more than one in ten tokens was begun again"


def test_exact_with_too_little_memory(tight: Pairs) -> None:
    """Two pairs whose prompts fit into a step together, so that only the cache, of which each takes 14 blocks in the
    end, can part them; then four that begin at once, some of which are preempted, or wait with one side in.
    Chi-square, false alarm one in 10,000."""
    prompts: list[Prompts] = [([i] * 20, [i, i + 1] * 10) for i in range(6)]
    two = tight.rollouts(prompts[:2], [{"max_tokens": 200, "seed": i} for i in range(2)])
    assert sum(map(tight.fell_apart, two)) > 0, "the cache was large enough"
    rollouts = two + tight.rollouts(prompts, [{"max_tokens": 110, "seed": i} for i in range(6)])
    assert [len(rollout["token_ids"]) for rollout in rollouts] == [200] * 2 + [110] * 6
    assert max(largest_errors(rollouts, tight.model).values()) < TOLERANCE
    assert distribution_p_value(rollouts[2:], tight.model) > 1e-4


def test_the_client_begins_no_more_than_the_cache_holds(tight: Pairs) -> None:
    """The same load through the coordinator: nothing is preempted, so nothing falls out of step."""
    before = metric(tight.server, "num_preemptions_total")

    async def work(coordinator: DualVLLMCoordinator) -> Any:
        thetas, ts = [[i] * 20 for i in range(6)], [[i, i + 1] * 10 for i in range(6)]
        outputs = await coordinator.generate_batch(thetas, t_prompts=ts, max_tokens=110)
        return outputs, coordinator.stats.decoding

    outputs, stats = coordinated(tight, work)
    assert [len(output.generated_tokens) for output in outputs] == [110] * 6
    assert metric(tight.server, "num_preemptions_total") == before
    assert stats.cache_waits > 0, "which is counted, and said once"
    assert stats.restarts == sum(output.generated_tokens[:-1].count(VOCAB_SIZE - 1) for output in outputs)


def test_the_same_seed_gives_the_same_tokens_in_any_company(tight: Pairs, ample: Pairs) -> None:
    """Alone, among others, and with restarts."""
    prompts = prompts_of(8, seed=5)
    bodies = [{"max_tokens": 30, "seed": 100 + i} for i in range(8)]
    crowded, at_ease = tight.rollouts(prompts, bodies), ample.rollouts(prompts, bodies)
    alone = ample.rollouts(prompts[3:4], bodies[3:4])
    tokens = [rollout["token_ids"] for rollout in crowded]
    assert tokens == [rollout["token_ids"] for rollout in at_ease] and tokens[3] == alone[0]["token_ids"]
    assert [ample.fell_apart(rollout) for rollout in (*at_ease, *alone)] == [0] * 9
    others = ample.rollouts(prompts[:3], [{"max_tokens": 30}] * 3)
    assert all(mine["token_ids"] != other["token_ids"] for mine, other in zip(at_ease, others, strict=False))


def test_first_tokens_follow_the_distribution(ample: Pairs) -> None:
    """300 rollouts of one pair of prompts. Chi-square, false alarm one in 10,000."""
    prompts: Prompts = (list(range(30, 60)), list(range(100, 145)))
    rollouts = ample.rollouts([prompts] * 300, [{"max_tokens": 1}] * 300)
    distribution = np.exp(distributions_of(rollouts[0], ample.model, ample.model)[2][0])
    drawn = np.bincount([rollout["token_ids"][0] for rollout in rollouts], minlength=VOCAB_SIZE)
    assert chi_square_p_value(drawn, 300 * distribution) > 1e-4


def test_every_method_in_one_batch(ample: Pairs) -> None:
    prompts, names = prompts_of(len(METHODS), seed=9), list(METHODS)
    bodies = [{"max_tokens": 20, "temperature": METHODS[name][1], **asdict(METHODS[name][0])} for name in names]
    for name, rollout in zip(names, ample.rollouts(prompts, bodies), strict=True):
        rule, temperature = METHODS[name]
        logps = [
            np.log(np.exp(logp / temperature) / np.exp(logp / temperature).sum(1, keepdims=True))
            for logp in distributions_of(rollout, ample.model, ample.model)[:2]
        ]
        assert rollout["alpha"] == pytest.approx(expected_alpha(rule, *logps), abs=1e-3), name
        chosen = np.arange(20), rollout["token_ids"]
        assert rollout["logprobs_theta"] == pytest.approx(logps[0][chosen], abs=TOLERANCE), name
        path = (1 - rollout["alpha"][:, None]) * logps[0] + rollout["alpha"][:, None] * logps[1]
        assert rollout["logprobs_q"] == pytest.approx(
            (path - np.log(np.exp(path).sum(1, keepdims=True)))[chosen], abs=TOLERANCE
        )


def test_without_a_target_tokens_are_the_policys(ample: Pairs) -> None:
    """Chi-square, false alarm one in 10,000."""
    prompts: list[Prompts] = [(prompt, None) for prompt in ragged_prompts(16, seed=2)]
    rollouts = ample.rollouts(prompts, [{"max_tokens": 40}] * 16)
    assert all((rollout["alpha"] == 0).all() for rollout in rollouts)
    assert max(largest_errors(rollouts, ample.model).values()) < TOLERANCE
    assert distribution_p_value(rollouts, ample.model) > 1e-4


def test_ordinary_requests_are_left_alone(ample: Pairs) -> None:
    """64 beside 64 pairs: greedy ones say what the model says, sampled ones have its distribution.
    Chi-square, false alarm one in 10,000."""

    async def work(session: aiohttp.ClientSession) -> list[Any]:
        async def plain(prompt: list[int], temperature: float) -> list[int]:
            body = {
                "model": ample.server.name,
                "prompt": prompt,
                "max_tokens": 12,
                "temperature": temperature,
                "logprobs": 0,
                "ignore_eos": True,
                "return_token_ids": True,
            }
            async with session.post(ample.server.url + "/v1/completions", json=body) as response:
                (choice,) = (await response.json())["choices"]
            found, expected = (
                choice["logprobs"]["token_logprobs"],
                logprobs_of(ample.model, prompt, choice["token_ids"]),
            )
            assert found == pytest.approx(expected[np.arange(12), choice["token_ids"]], abs=TOLERANCE)
            if temperature == 0:
                assert choice["token_ids"] == expected.argmax(1).tolist()
            return choice["token_ids"]

        pairs = [ample.rollout(session, pair, max_tokens=12) for pair in prompts_of(64, seed=20)]
        others = [plain(prompt, i % 4 > 0) for i, prompt in enumerate(ragged_prompts(64, seed=40))]
        return await asyncio.gather(*pairs, *others)

    found = in_session(work)
    assert max(largest_errors(found[:64], ample.model).values()) < TOLERANCE
    assert not any(map(ample.fell_apart, found[:64]))
    assert distribution_p_value(found[:64], ample.model) > 1e-4
    sampled = [
        {"prompts": (prompt, None), "token_ids": tokens, "alpha": np.zeros(12)}
        for i, (prompt, tokens) in enumerate(zip(ragged_prompts(64, seed=40), found[64:], strict=True))
        if i % 4
    ]
    assert distribution_p_value(sampled, ample.model) > 1e-4


def test_ordinary_requests_sample_what_a_server_without_pairs_does(ample: Pairs, vllm_pair: ServerPair) -> None:
    """The same model, seeds and settings, here beside 32 pairs."""
    settings = {
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.01,
        "presence_penalty": 0.5,
        "repetition_penalty": 1.2,
        "logit_bias": {"7": 2.0},
    }

    async def plain(session: aiohttp.ClientSession, server: VllmServer, seed: int) -> list[int]:
        body = {
            "model": server.name,
            "prompt": ragged_prompts(16, seed=60)[seed],
            "max_tokens": 24,
            "seed": seed,
            "temperature": 0.8 + 0.1 * (seed % 4),
            "ignore_eos": True,
            "return_token_ids": True,
            **(settings if seed % 2 else {}),
        }
        async with session.post(server.url + "/v1/completions", json=body) as response:
            return (await response.json())["choices"][0]["token_ids"]

    async def work(session: aiohttp.ClientSession) -> list[Any]:
        pairs = [ample.rollout(session, pair, max_tokens=40) for pair in prompts_of(32, seed=70)]
        return await asyncio.gather(*(plain(session, ample.server, seed) for seed in range(16)), *pairs)

    async def alone(session: aiohttp.ClientSession) -> list[Any]:
        return await asyncio.gather(*(plain(session, vllm_pair.theta, seed) for seed in range(16)))

    assert in_session(work)[:16] == in_session(alone)


def test_a_stop_token_ends_the_rollout(ample: Pairs) -> None:
    """Also the token that marks rows which are alone, the last of the vocabulary, is a token like any other."""
    stops = list(range(0, VOCAB_SIZE, 3))
    for rollout in ample.rollouts(prompts_of(6, seed=3), [{"max_tokens": 60, "stop_token_ids": stops}] * 6):
        assert rollout["finish_reason"] == "stop" and rollout["token_ids"][-1] % 3 == 0
        assert all(token % 3 for token in rollout["token_ids"][:-1])
    rollouts = ample.rollouts(prompts_of(32, seed=4), [{"max_tokens": 60}] * 32)
    assert {(len(rollout["token_ids"]), rollout["finish_reason"]) for rollout in rollouts} == {(60, "length")}
    assert sum(rollout["restarts"] for rollout in rollouts) > 0 and not any(map(ample.fell_apart, rollouts))
    assert max(largest_errors(rollouts, ample.model).values()) < TOLERANCE


def test_a_client_that_goes_away_leaves_nothing_behind(ample: Pairs) -> None:
    async def work(session: aiohttp.ClientSession) -> None:
        tasks = [asyncio.create_task(ample.rollout(session, pair, max_tokens=400)) for pair in prompts_of(8, seed=6)]
        while metric(ample.server, "num_requests_running") == 0:
            assert not all(task.done() for task in tasks), "they ended before any was seen"
            await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while metric(ample.server, "num_requests_running") > 0:
            await asyncio.sleep(0.05)

    in_session(work)
    rollouts = ample.rollouts(prompts_of(8, seed=7), [{"max_tokens": 20}] * 8)
    assert max(largest_errors(rollouts, ample.model).values()) < TOLERANCE


@NEEDS_LORA
def test_each_side_may_be_an_adapter_or_the_base(ample: Pairs, tmp_path: Path) -> None:
    """In the memory of one model. The names of adapters are those of `/v1/load_lora_adapter`."""
    policy = load_adapter(ample, tmp_path, "policy", seed=3)
    rollouts = ample.rollouts(prompts_of(6, seed=8), [{"max_tokens": 20, "model": "policy"}] * 6)
    assert max(largest_errors(rollouts, policy, ample.model).values()) < TOLERANCE
    assert min(np.abs(rollout["logprobs_theta"] - rollout["logprobs_t"]).max() for rollout in rollouts) > 0.1
    turned = ample.rollouts(prompts_of(2, seed=8), [{"max_tokens": 20, "t_model": "policy"}] * 2)
    assert max(largest_errors(turned, ample.model, policy).values()) < TOLERANCE

    async def one_prompt(coordinator: DualVLLMCoordinator) -> Any:
        return await coordinator.generate_batch([[3, 1, 4]] * 2, max_tokens=20, return_diagnostics=True)

    adapted = coordinated(ample, one_prompt, t_model="policy")
    assert max(largest_errors([as_rollout(output, [3, 1, 4]) for output in adapted], ample.model, policy).values()) < (
        TOLERANCE
    )
    assert min(max(output.diagnostics["kl_t"]) for output in adapted) > 1e-3, "one prompt, two distributions"

    other = load_adapter(ample, tmp_path, "other", seed=4)
    assert ample.describe()["adapters"] == ["other", "policy"]
    names = {"model": "policy", "t_model": "other"}
    both = ample.rollouts(prompts_of(4, seed=8), [{"max_tokens": 20, **names}] * 4)
    assert max(largest_errors(both, policy, other).values()) < TOLERANCE
    # The last place of two is taken now. vLLM's CPU build by itself would show it to rows without an adapter.
    mixed = ample.rollouts(prompts_of(4, seed=8), [{"max_tokens": 20, "model": "policy"}] * 4)
    assert max(largest_errors(mixed, policy, ample.model).values()) < TOLERANCE
    for name in names.values():
        adapter_route(ample.server, "unload", lora_name=name)


def load_adapter(pairs: Pairs, folder: Path, name: str, seed: int) -> Any:
    """Give the server a random adapter; the model with it, by PEFT."""
    torch.manual_seed(seed)
    lora = LoraConfig(target_modules=["q_proj", "down_proj"], r=8, init_lora_weights=False)
    base = AutoModelForCausalLM.from_pretrained(pairs.server.model, dtype=torch.float32)
    get_peft_model(base, lora).save_pretrained(folder / name)
    adapter_route(pairs.server, "load", lora_name=name, lora_path=str(folder / name), load_inplace=True)
    loaded = AutoModelForCausalLM.from_pretrained(pairs.server.model, dtype=torch.float32)
    return PeftModel.from_pretrained(loaded, folder / name).eval()


def coordinated(pairs: Pairs, work: Callable[[DualVLLMCoordinator], Coroutine[Any, Any, Any]], **options: Any) -> Any:
    config = CoordinatorConfig(engine="native", theta_url=pairs.server.url, ignore_eos=True, seed=1, **options)

    async def run() -> Any:
        async with DualVLLMCoordinator(config) as coordinator:
            return await work(coordinator)

    return asyncio.run(run())


def as_rollout(output: GenerationOutput, t_prompt: list[int]) -> dict[str, Any]:
    record, diagnostics = output.record, output.diagnostics
    return {
        "prompts": (output.prompt_token_ids, t_prompt),
        "token_ids": output.generated_tokens,
        "alpha": np.array(output.alpha_history),
        "logprobs_q": np.array(record.logprobs_q),
        "logprobs_theta": np.array(record.logprobs_theta),
        "logprobs_t": np.array(record.logprobs_t),
        "kl_theta": np.array(diagnostics["kl_theta"]),
        "kl_t": np.array(diagnostics["kl_t"]),
    }


def test_the_coordinator_draws_pairs(ample: Pairs) -> None:
    """More at once than the server has places for, some of them without a target; the whole record, and streamed."""
    prompts = prompts_of(20, seed=11)
    targets = [None, None, None, "none"] * 5
    thetas, ts = [pair[0] for pair in prompts], [pair[1] for pair in prompts]

    async def work(coordinator: DualVLLMCoordinator) -> Any:
        options = {"max_tokens": 24, "return_diagnostics": True, "alpha_rule": AlphaRule(alpha_max=0.3)}
        outputs = await coordinator.generate_batch(thetas, t_prompts=ts, targets=targets, **options)
        chunks = [
            chunk
            async for chunk in coordinator.generate_stream(
                thetas[0], t_prompt=ts[0], max_tokens=24, alpha_rule=AlphaRule(alpha_max=0.3)
            )
        ]
        return outputs, chunks, coordinator.stats.decoding

    outputs, chunks, stats = coordinated(ample, work)
    assert [output.error for output in outputs] == [None] * 20
    drawn = [as_rollout(output, t_prompt) for output, t_prompt in zip(outputs, ts, strict=True)]
    with_target = [rollout for rollout, target in zip(drawn, targets, strict=True) if target is None]
    assert max(largest_errors(with_target, ample.model).values()) < TOLERANCE
    assert max(rollout["alpha"].max() for rollout in with_target) == pytest.approx(0.3, abs=1e-6)
    for output, target in zip(outputs, targets, strict=True):
        assert set(output.record.without_target) == {target == "none"}
        if target == "none":
            assert set(output.importance_weights) == {1.0} and set(output.alpha_history) == {0.0}
    assert [chunk.token_id for chunk in chunks] == outputs[0].generated_tokens
    assert [chunk.importance_weight for chunk in chunks] == pytest.approx(outputs[0].importance_weights, rel=1e-4)
    assert stats.policy_tokens == 5 * 24


def test_the_documents_commands_and_python(ample: Pairs) -> None:
    """Of docs/native.md, beside the command that starts this server, which is that of recipes/native/README.md."""
    address = "http://127.0.0.1:8000"
    (doctor,) = subcommands("docs/native.md", "doctor")
    assert main([ample.server.url if word == address else word for word in doctor]) == 0
    models = dict.fromkeys(("MODEL", "THETA", "T"), str(ample.server.model))
    for command in subcommands("docs/native.md", "serve-native"):
        assert main([*(models.get(word, word) for word in command if word != "..."), "--dry-run"]) == 0

    source = snippet("docs/native.md", "DualVLLMCoordinator").replace(address, ample.server.url)
    names = {type_.__name__: type_ for type_ in (CoordinatorConfig, DualVLLMCoordinator)}
    thetas, ts = map(list, zip(*prompts_of(4, seed=12), strict=True))
    outputs = run_snippet(source, questions=thetas, questions_with_answers=ts, **names)["outputs"]
    for output, t_prompt in zip(outputs, ts, strict=True):
        assert output.error is None and output.generated_tokens
        rollout = {"prompts": (output.prompt_token_ids, t_prompt), "token_ids": output.generated_tokens}
        alpha = np.array(output.alpha_history)
        logp_theta, _, log_q = distributions_of({**rollout, "alpha": alpha}, ample.model, ample.model)
        chosen = np.arange(len(alpha)), output.generated_tokens
        assert output.logprobs_q == pytest.approx(log_q[chosen], abs=TOLERANCE)
        kl = (np.exp(log_q) * (log_q - logp_theta)).sum(1)
        assert kl.max() == pytest.approx(0.05, abs=1e-4), "the page's bound, which prompts so unlike reach"


def test_rows_are_generated_with_a_prompt_for_each_side(ample: Pairs, tmp_path: Path) -> None:
    thetas, ts = [[1, 2, 3], [4]], [[5, 6], [7, 8, 9, 10]]
    rows = [json.dumps({"prompt": theta, "hint": t}) for theta, t in zip(thetas, ts, strict=True)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    files = ["--input", str(tmp_path / "prompts.jsonl"), "--output", str(tmp_path / "out"), "--format", "jsonl"]
    flags = ["--engine", "native", "--theta-url", ample.server.url, "--max-tokens", "6", "--ignore-eos"]
    assert main(["generate", *files, "--t-prompt-column", "hint", *flags]) == 0
    (shard,) = (tmp_path / "out").glob("train-*.jsonl")
    for row, theta, t in zip(map(json.loads, shard.read_text().splitlines()), thetas, ts, strict=True):
        for name, prompt in (("logprobs_theta", theta), ("logprobs_t", t)):
            own = logprobs_of(ample.model, prompt, row["generated_tokens"])[np.arange(6), row["generated_tokens"]]
            assert row[name] == pytest.approx(own, abs=TOLERANCE)


def test_bench_compares_pairs_with_plain_generation_of_both_contexts(ample: Pairs, tmp_path: Path) -> None:
    flags = ["--concurrency", "2", "--context", "16", "--max-tokens", "4", "--output", str(tmp_path)]
    modes = ["--modes", "pairs_plain", "pairs", "native_plain", "native"]
    assert main(["bench", "--native-url", ample.server.url, *modes, *flags]) == 0
    rows = {row["mode"]: row for row in json.loads((tmp_path / "bench.json").read_text())["rows"]}
    assert set(rows) == set(modes[1:]) and all(row["tokens_per_second"] > 0 for row in rows.values())
    assert rows["pairs"]["relative"]["pairs_plain"] > 0 and rows["pairs_plain"]["relative"]["pairs_plain"] == 1
    assert rows["pairs_plain"]["requests_per_token"] == 2 * rows["pairs"]["requests_per_token"] == 2 / 4


def test_doctor_compares_values(ample: Pairs) -> None:
    found = report(ample.server.url, None)
    assert found["ok"] and found["servers"]["native"]["max_requests"] == (16 if ON_GPU else 32)
    (values,) = [check["detail"] for check in found["checks"] if check["name"] == "values"]
    assert "both sides within" in values


@pytest.mark.parametrize(("drawn", "advice"), [(4, "speed: raise max_concurrency, 4, to fill them"), (32, "")])
def test_doctor_says_that_places_stay_empty(ample: Pairs, drawn: int, advice: str) -> None:
    async def examine() -> Examination:
        config = CoordinatorConfig(engine="native", theta_url=ample.server.url, max_concurrency=drawn)
        async with DualVLLMCoordinator(config) as coordinator:
            return await coordinator.servers.examine()

    assert [check.fix for check in asyncio.run(examine()).checks if check.name == "places"] == [advice]


def test_doctor_sees_numbers_of_other_rows(ample: Pairs) -> None:
    """As CUDA graphs once mixed them up; here each token has the numbers of the one before."""

    def shift(answer: dict[str, Any]) -> None:
        if "numbers" not in answer:  # of an ordinary request, which they are compared with
            return
        numbers = np.frombuffer(base64.b64decode(answer["numbers"]), "<f4").reshape(len(answer["token_ids"]), -1)
        answer["numbers"] = base64.b64encode(np.roll(numbers, 1, axis=0).tobytes()).decode()

    async def examine() -> Examination:
        async with (
            FaultProxy(ample.server.url, changed(shift)).running() as proxy,
            DualVLLMCoordinator(CoordinatorConfig(engine="native", theta_url=proxy.url)) as coordinator,
        ):
            return await coordinator.servers.examine()

    failed = [check for check in asyncio.run(examine()).checks if check.status == "failed"]
    assert [check.name for check in failed] == ["values"] and "nats from the server's own" in failed[0].detail


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt_token_ids": []}, "prompt_token_ids must be a list of token ids, at least one"),
        ({"prompt_token_ids": [VOCAB_SIZE]}, "prompt_token_ids has a token id outside"),
        ({"t_prompt_token_ids": "text"}, "t_prompt_token_ids must be a list"),
        ({"max_tokens": 0}, "max_tokens must be"),
        ({"max_tokens": 510}, "--max-model-len"),
        ({"seed": -1}, "seed must be"),
        ({"alpha_method": "mean"}, "alpha_method must be one of"),
        ({"alpha_min": 0.9, "alpha_max": 0.1}, "must not exceed"),
        ({"temperature": 0}, "temperature must be"),
        ({"top_k": 5}, "unknown field 'top_k'"),
    ],
)
def test_bad_requests_are_refused(ample: Pairs, body: dict[str, Any], message: str) -> None:
    good = {"prompt_token_ids": [1, 2, 3], "t_prompt_token_ids": [4, 5], "max_tokens": 5}
    with pytest.raises(urllib.error.HTTPError) as refused:
        ample.server.post("/v1/dual_rollout/generate", good | body)
    assert refused.value.code == 400
    assert message in json.load(refused.value)["error"]["message"]


def test_a_model_that_is_not_served_is_not_found(ample: Pairs) -> None:
    body = {"prompt_token_ids": [1], "t_prompt_token_ids": [2], "max_tokens": 1, "t_model": "other"}
    with pytest.raises(urllib.error.HTTPError) as refused:
        ample.server.post("/v1/dual_rollout/generate", body)
    assert refused.value.code == 404 and "served are" in json.load(refused.value)["error"]["message"]


def test_an_aborted_side_ends_its_partner(ample: Pairs) -> None:
    """The policy's or the target's, by vLLM's own request, which asks for the names of requests; the log has them.
    Chi-square, false alarm one in 10,000."""

    async def work(session: aiohttp.ClientSession) -> list[dict[str, Any]]:
        begun = len(ample.server.log.read_text())
        prompts = prompts_of(4, seed=13)
        tasks = [
            asyncio.create_task(ample.rollout(session, pair, max_tokens=400, seed=i)) for i, pair in enumerate(prompts)
        ]
        while not all(task.done() for task in tasks):
            added = re.findall(r"Added request (dual-rollout-[0-9a-f]{32})-", ample.server.log.read_text()[begun:])
            if len(added) >= 8:
                names = [f"{name}-{('theta', 't')[i % 2]}" for i, name in enumerate(dict.fromkeys(added))]
                async with session.post(ample.server.url + "/abort_requests", json={"request_ids": names}) as response:
                    assert response.status == 200
                break
            await asyncio.sleep(0.01)
        return await asyncio.gather(*tasks)

    for _ in range(20):  # they may have ended before
        rollouts = in_session(work)
        assert max(largest_errors(rollouts, ample.model).values()) < TOLERANCE
        assert [len(rollout["token_ids"]) for rollout in rollouts] == [400] * 4
        if any(ample.fell_apart(rollout) > 0 for rollout in rollouts):
            break
    else:
        raise AssertionError("none was aborted")
    assert distribution_p_value(rollouts, ample.model) > 1e-4
    undisturbed = ample.rollouts(prompts_of(4, seed=13), [{"max_tokens": 400, "seed": i} for i in range(4)])
    assert [one["token_ids"] for one in rollouts] == [one["token_ids"] for one in undisturbed]
