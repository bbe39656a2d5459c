"""`dual-rollout doctor` and the preflight, against servers with each kind of fault."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from dual_rollout import CoordinatorConfig, DualRollout, DualVLLMCoordinator
from dual_rollout.cli import main
from dual_rollout.exceptions import EngineProtocolError, PreflightError
from dual_rollout.samplers.examination import Examination
from dual_rollout.servers import Capabilities, HttpTransport, VLLMEngine
from dual_rollout.tokenizer_check import compare_tokens
from dual_rollout.tokenizer_files import compare_vocabularies, read_vocabulary
from tests.fault_proxy import Exchange, Fault, FaultProxy, passed_on
from tests.hang import HANG
from tests.markov_server import MarkovServer, random_chain
from tests.warm_servers import WarmServer

DEAD = "http://127.0.0.1:9"
CHAIN = random_chain(np.random.default_rng(0), 8)


def doctor(theta: str, t: str | None, *flags: str) -> tuple[int, str]:
    """Exit status and what it printed. Without `t`, of a native server."""
    other = ["--engine", "native"] if t is None else ["--t-url", t]
    command = [sys.executable, "-m", "dual_rollout.cli", "doctor", "--theta-url", theta, *other, *flags]
    patience = [] if "--timeout" in flags else ["--timeout", "100"]  # the default may be too little on a busy machine
    done = subprocess.run([*command, *patience], capture_output=True, text=True, timeout=HANG)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout


def in_one_line(printed: str) -> str:
    return " ".join(printed.split())


def report(theta: str, t: str | None, *flags: str) -> dict[str, Any]:
    status, printed = doctor(theta, t, *flags, "--json")
    found = json.loads(printed)
    assert found["ok"] is (status == 0)
    return found


def failed(found: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [check for check in found["checks"] if check["status"] == "failed"]
    assert all(check["fix"] for check in rows)
    return [(check["server"], check["name"]) for check in rows]


@pytest.fixture(scope="module")
def small_urls(tiny_models: tuple[Path, Path]) -> Iterator[tuple[str, str]]:
    """A plain server, and one that says what it is at another temperature; both give 20 log-probabilities."""
    flags = ["--max-logprobs", "20", "--max-model-len", "256", "--threads", "1"]
    processed = ["--logprobs-mode", "processed_logprobs", "--enable-lora"]
    with WarmServer(tiny_models[0], flags) as theta, WarmServer(tiny_models[1], [*flags, *processed]) as t:
        yield theta.url, t.url


@contextlib.asynccontextmanager
async def serving(*routes: web.RouteDef) -> AsyncIterator[str]:
    app = web.Application()
    app.add_routes(routes)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


# ---- doctor


def test_a_good_pair(small_urls):
    status, printed = doctor(*small_urls, "--top-k", "20")
    assert status == 0
    assert "✗" not in printed and printed.count("✓") > 8
    longest_words = (max(map(len, line.split()), default=0) for line in printed.splitlines())
    assert all(len(line) <= 80 or word > 40 for line, word in zip(printed.splitlines(), longest_words, strict=True))
    for word in ("dual_rollout", "python", "trl", "transformers", "torch", *small_urls):
        assert word in printed


def test_a_good_pair_for_machines(small_urls):
    found = report(*small_urls, "--top-k", "20")
    assert found["ok"]
    assert [found["servers"][side]["logprobs_mode"] for side in ("theta", "t")] == ["raw", "processed"]
    assert [found["servers"][side]["loads_lora"] for side in ("theta", "t")] == [False, True]
    assert found["servers"]["theta"]["max_logprobs"] == 20
    optional = [(c["server"], c["name"]) for c in found["checks"] if c["status"] == "optional"]
    assert ("π_θ", "LoRA loading") in optional and ("π_θ", "weight reload") not in optional
    tokens = next(check for check in found["checks"] if check["name"] == "tokens")
    assert tokens["status"] == "ok"


def test_a_list_that_is_too_long(small_urls):
    found = report(*small_urls, "--top-k", "21")
    assert failed(found) == [("π_θ", "top_k"), ("π_t", "top_k")]
    assert "--max-logprobs 21" in str(found["checks"])


def test_lists_as_long_as_they_have_to_be(small_urls):
    """`top_k: auto` asks for what a server gives, so that no limit is too low for it."""
    config = CoordinatorConfig(theta_url=small_urls[0], t_url=small_urls[1], top_k="auto", support="tail")

    async def examine() -> Examination:
        async with DualVLLMCoordinator(config) as coordinator:
            return await coordinator.servers.examine()

    rows = [check for check in asyncio.run(examine()).checks if check.name == "top_k"]
    assert [(row.status, row.detail) for row in rows] == [("ok", "auto, up to 20 of at most 20")] * 2


def test_dead_servers(small_urls):
    assert failed(report(small_urls[0], DEAD, "--top-k", "20")) == [("π_t", "server")]
    status, printed = doctor(DEAD, DEAD)
    assert status == 1 and printed.count("✗") >= 2 and "theta_url" in printed


def test_one_server_for_both(small_urls):
    found = report(small_urls[0], small_urls[0], "--top-k", "20")
    assert found["ok"], "π_t may see other prompts"
    row = next(check for check in found["checks"] if check["name"] == "two models")
    assert row["status"] == "optional" and "α" in row["fix"]


def test_something_else_and_something_that_hangs():
    async def hello(_: web.Request) -> web.Response:
        return web.Response(text="hello")

    async def hang(_: web.Request) -> web.Response:
        await asyncio.sleep(3600)
        return web.Response()

    async def run() -> dict[str, Any]:
        async with serving(web.get("/{path:.*}", hello)) as one, serving(web.get("/{path:.*}", hang)) as other:
            return await asyncio.to_thread(report, one, other, "--timeout", "2")

    found = asyncio.run(run())
    assert failed(found) == [("π_θ", "server"), ("π_t", "server")]


def refusing(message: str) -> Fault:
    """As vLLM does with a feature of its other model runner."""

    async def fault(exchange: Exchange) -> web.StreamResponse:
        if "prompt_logprob_token_ids" in json.loads(exchange.body or "{}").get("sampling_params", {}):
            return web.json_response({"error": {"message": message}}, status=400)
        return await passed_on(exchange)

    return fault


async def taking_one_list_for_all_rows(exchange: Exchange) -> web.StreamResponse:
    """As vLLM up to 0.31."""
    body = json.loads(exchange.body or "{}")  # empty where the probe asks what is there
    sampling = body.get("sampling_params", {})
    if (names := sampling.get("prompt_logprob_token_ids")) is not None:
        if not all(isinstance(name, int) for name in names):
            return web.json_response({"error": {"message": "Input should be a valid integer"}}, status=400)
        rows = len(body["token_ids"]) - 1 - sampling["prompt_logprob_start"]
        sampling["prompt_logprob_token_ids"] = [names] * rows
        exchange = replace(exchange, body=json.dumps(body).encode())
    return await passed_on(exchange)


def test_what_is_refused_where_it_should_be_is_said(small_urls, caplog):
    message = "prompt_logprob_token_ids requires the V2 model runner"

    async def run() -> tuple[Capabilities, str]:
        async with FaultProxy(small_urls[0], refusing(message)).running() as proxy:
            async with contextlib.aclosing(VLLMEngine(HttpTransport(proxy.url))) as engine:
                found = await engine.probe([1, 2])
            return found, (await asyncio.to_thread(doctor, proxy.url, small_urls[1], "--top-k", "20"))[1]

    found, printed = asyncio.run(run())
    assert (found.named_rows, found.cached_rows, found.scoring) == (None, False, ("prefixes",))
    assert len(found.refused) == 1 and message in found.refused[0]
    assert message in caplog.text and message in in_one_line(printed)


def test_tokens_are_named_in_the_form_that_the_server_takes(small_urls):
    """More names than a list may have, none at some positions, and some at several."""
    prompts, drafts = [[1, 2, 3], [4]], [np.array([5, 6, 7]), np.array([8, 9])]
    names = [[], [7, 3], list(range(30, 75)), [60], [3, 2]]

    async def run() -> list[tuple[Capabilities, list[np.ndarray]]]:
        async with FaultProxy(small_urls[0], taking_one_list_for_all_rows).running() as proxy:
            answers = []
            for url in (small_urls[0], proxy.url):
                async with contextlib.aclosing(VLLMEngine(HttpTransport(url))) as engine:
                    answers.append((await engine.probe([1, 2]), await engine.score_named(prompts, drafts, names)))
            return answers

    (new, rows), (old, same) = asyncio.run(run())
    assert (new.named_rows, old.named_rows) == ("per row", "shared")
    assert new.refused == old.refused == () and new.scoring == old.scoring == ("token_ids", "prefixes")
    assert [len(row) for row in rows] == [len(ids) for ids in names]
    for row, other in zip(rows, same, strict=True):
        np.testing.assert_allclose(row, other, atol=1e-4)


class CompilingServer(MarkovServer):
    """Answers nothing for the first 1.5 s after it was first asked, as a vLLM with cold caches does for longer."""

    compiled_at: float | None = None

    async def _completions(self, request: web.Request) -> web.Response:
        now = asyncio.get_running_loop().time()
        self.compiled_at = self.compiled_at or now + 1.5
        await asyncio.sleep(max(0.0, self.compiled_at - now))
        return await super()._completions(request)


def test_a_server_that_compiles_at_its_first_requests_is_given_time(monkeypatch, capsys):
    async def run(*flags: str) -> int:
        async with CompilingServer(CHAIN).running() as server:
            urls = ["--theta-url", server.url, "--t-url", server.url]
            return await asyncio.to_thread(main, ["doctor", *urls, "--top-k", "5", *flags])

    monkeypatch.setattr("dual_rollout.cli.doctor.TIMEOUT_S", 0.5)
    assert asyncio.run(run()) == 1
    assert "(--timeout 300)" in in_one_line(capsys.readouterr().out)
    assert asyncio.run(run("--timeout", "60")) == 0, capsys.readouterr().out


def test_a_web_server_is_named_by_the_title_of_its_page():
    page = "<!DOCTYPE html>\n<html><head><title>\n 404 Not Found </title></head><body>" + "<p>words</p>" * 100

    async def show(_: web.Request) -> web.Response:
        return web.Response(text=page, status=404, content_type="text/html")

    async def run() -> tuple[int, str]:
        async with serving(web.get("/{path:.*}", show)) as url:
            return await asyncio.to_thread(doctor, url, url)

    status, printed = asyncio.run(run())
    assert status == 1 and 'an HTML page, "404 Not Found"' in in_one_line(printed) and "<" not in printed


def test_servers_that_offer_little():
    async def run() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        async with MarkovServer(CHAIN).running() as theta, MarkovServer(CHAIN, processed=True).running() as t:
            return await asyncio.to_thread(report, theta.url, t.url), theta.requests

    found, requests = asyncio.run(run())
    assert found["ok"]
    assert [found["servers"][side]["logprobs_mode"] for side in ("theta", "t")] == ["raw", "processed"]
    assert found["servers"]["theta"]["version"] is None
    # But for the fixed text by whose score the weights are known.
    alone = [request["prompt"] for request in requests if "prompt_logprobs" not in request]
    assert all(token < 8 for prompt in alone for token in prompt if isinstance(token, int))


def test_what_a_training_run_needs_besides(tiny_models, small_urls, tmp_path):
    """Servers with which a rollout would work, and a training run would not."""

    async def without_reload() -> tuple[dict[str, Any], dict[str, Any]]:
        async with MarkovServer(CHAIN).running() as theta, MarkovServer(CHAIN).running() as t:
            plain = await asyncio.to_thread(report, theta.url, t.url)
            return plain, await asyncio.to_thread(report, theta.url, t.url, "--train")

    plain, training = asyncio.run(without_reload())
    assert plain["ok"] and failed(training) == [("π_θ", "weight reload")]
    assert "VLLM_SERVER_DEV_MODE=1" in next(c["fix"] for c in training["checks"] if c["name"] == "weight reload")

    status, printed = doctor(*small_urls, "--top-k", "20", "--train", "--weights-dir", str(tmp_path))
    assert status == 0 and "A training run would work." in printed and f"sees {tmp_path}" in in_one_line(printed)
    assert list(tmp_path.iterdir()) == [], "nothing is left there"
    assert failed(report(*small_urls, "--top-k", "20", "--train", "lora")) == [("π_θ", "LoRA loading")]
    assert report(*small_urls[::-1], "--top-k", "20", "--train", "lora")["ok"], "π_t's server need not load any"

    elsewhere = ["--max-logprobs", "20", "--threads", "1", "--weights-dir", str(tiny_models[0])]
    with WarmServer(tiny_models[0], elsewhere) as server:
        found = report(server.url, small_urls[1], "--top-k", "20", "--train", "--weights-dir", str(tmp_path))
    assert failed(found) == [("π_θ", "weights folder")]


def test_a_weights_folder_is_there_and_for_training(small_urls, tmp_path):
    for flags in (["--weights-dir", str(tmp_path)], ["--train", "--weights-dir", str(tmp_path / "not")]):
        assert doctor(*small_urls, *flags)[0] == 2


def test_mistyped_addresses_are_the_users_mistake():
    status, _ = doctor("localhost:8000", DEAD)
    assert status == 2


def test_what_is_no_native_server(small_urls):
    found = report(small_urls[0], None)
    assert failed(found) == [("q*", "native")] and found["servers"] == {"native": None}
    assert "serve-native" in str(found["checks"])
    assert failed(report(DEAD, None)) == [("q*", "server")]


@pytest.mark.parametrize("flags", [[], ["--engine", "native", "--t-url", DEAD]])
def test_two_urls_for_two_servers(flags, capsys):
    assert main(["doctor", "--theta-url", DEAD, *flags]) == 2
    assert "--t-url" in capsys.readouterr().err


# ---- tokens


def changed_tokenizer(model: Path, folder: Path) -> Path:
    """The model with two tokens' ids swapped."""
    shutil.copytree(model, folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))
    return folder


def test_vocabularies_with_different_ids(tiny_models, tmp_path):
    original = read_vocabulary(str(tiny_models[0]))
    swapped = read_vocabulary(str(changed_tokenizer(tiny_models[0], tmp_path / "swapped")))
    assert original is not None and swapped is not None
    assert original.roles["eos_token"] == "<|im_end|>" and original.chat_template
    assert compare_vocabularies(original, original) == compare_vocabularies(swapped, swapped)
    comparison = compare_vocabularies(original, swapped)
    a, b = original.ids["a"], original.ids["b"]
    assert comparison.same is False
    assert comparison.differences == (
        f"id {a} is 'a' for π_θ and 'b' for π_t",
        f"id {b} is 'b' for π_θ and 'a' for π_t",
    )


def test_five_differences_are_shown_and_additions_are_none(tiny_models):
    original = read_vocabulary(str(tiny_models[0]))
    shifted = type(original)({token: i + 1 for token, i in original.ids.items()}, {}, None)
    comparison = compare_vocabularies(original, shifted)
    assert len(comparison.differences) == 5
    added = type(original)({**original.ids, "<tool>": len(original.ids)}, {**original.roles, "pad_token": "x"}, None)
    comparison = compare_vocabularies(original, added)
    assert comparison.same and comparison.differences == ()
    assert [any(word in note for note in comparison.notes) for word in ("<tool>", "pad_token", "chat template")] == [
        True
    ] * 3


def test_a_few_renamed_tokens_are_a_note(tiny_models):
    """As between a base model with reserved tokens and its child; not where one has the other's name."""
    original = read_vocabulary(str(tiny_models[0]))
    renamed = {**{f"<tool_{t}>" if t == "a" else t: i for t, i in original.ids.items()}}
    comparison = compare_vocabularies(original, type(original)(renamed, original.roles, original.chat_template))
    assert comparison.same and "1 tokens have another name" in comparison.notes[0] and "<tool_a>" in comparison.notes[0]
    all_renamed = type(original)({f"<{t}>": i for t, i in original.ids.items()}, {}, None)
    assert compare_vocabularies(original, all_renamed).same is False


def test_a_folder_on_another_machine_has_no_vocabulary(tmp_path):
    assert read_vocabulary(str(tmp_path / "absent")) is None
    assert read_vocabulary("organisation/absent-model") is None


class Texts:
    """An engine that has only texts."""

    def __init__(self, texts: list[str]):
        self.texts = texts

    async def detokenize(self, ids: list[int]) -> str:
        if max(ids) >= len(self.texts):
            raise EngineProtocolError("no such id", url="http://texts")
        return "".join(self.texts[i] for i in ids)


def test_tokens_that_only_the_servers_know():
    plain = Capabilities("m", detokenizes=True, vocab_size=100)
    texts = [f"<{i}>" for i in range(100)]
    other = [*texts[:40], "wrong", *texts[41:]]

    def compare(theta: list[str], t: list[str], capabilities: Capabilities = plain) -> Any:
        engines: Any = (Texts(theta), Texts(t))
        return asyncio.run(compare_tokens(*engines, capabilities, capabilities))

    assert compare(texts, texts).same is True
    assert compare(texts, other).same is False
    assert compare(texts, other).differences == ("id 40 is '<40>' for π_θ and 'wrong' for π_t",)
    assert compare(texts, texts, Capabilities("m")).same is None
    assert compare(texts[:9], texts[:9]).same is None, "refused by the servers"


def test_different_tokens_are_refused_everywhere(tiny_models, small_urls, tmp_path):
    folder = changed_tokenizer(tiny_models[1], tmp_path / "swapped")
    with WarmServer(folder, ["--max-logprobs", "20", "--threads", "1"]) as server:
        assert failed(report(small_urls[0], server.url, "--top-k", "20")) == [("both", "tokens")]
        with pytest.raises(PreflightError, match=r"same tokens: id \d+ is 'a' for π_θ"):
            rollout(theta_url=small_urls[0], t_url=server.url, top_k=20)


# ---- preflight


def rollout(prompts: Any = ([1, 2],), **options: Any) -> Any:
    async def run() -> Any:
        async with DualVLLMCoordinator(CoordinatorConfig(max_retries=0, seed=1, **options)) as coordinator:
            return await coordinator.generate_batch(list(prompts), max_tokens=2)

    return asyncio.run(asyncio.wait_for(run(), HANG))


def test_top_k_above_the_servers_limit_is_refused(small_urls):
    with pytest.raises(PreflightError, match=r"top_k is 21.*at most 20.*--max-logprobs 21"):
        rollout(theta_url=small_urls[0], t_url=small_urls[1], top_k=21)


def test_exact_lists_need_named_tokens():
    async def run() -> None:
        async with MarkovServer(CHAIN, ignore=("logprob_token_ids",)).running() as server:
            await asyncio.to_thread(rollout, theta_url=server.url, t_url=server.url, top_k=4, missing="exact")

    with pytest.raises(PreflightError, match='missing="floor"'):
        asyncio.run(run())


@pytest.mark.parametrize("t_prompts", [None, [[2, 1]]])
def test_one_model_as_both_is_warned_about(caplog, t_prompts):
    async def run() -> None:
        async with MarkovServer(CHAIN).running() as server:
            config = CoordinatorConfig(theta_url=server.url, t_url=server.url, top_k=4)
            async with DualVLLMCoordinator(config) as coordinator:
                await coordinator.generate_batch([[1, 2]], max_tokens=2, t_prompts=t_prompts)

    with caplog.at_level(logging.WARNING):
        asyncio.run(run())
    assert any("α means nothing" in message for message in caplog.messages) is (t_prompts is None)


def test_capabilities_are_logged_once(small_urls, caplog):
    with caplog.at_level(logging.INFO, logger="dual_rollout"):
        rollout(theta_url=small_urls[0], t_url=small_urls[1], top_k=20)
    lines = [message for message in caplog.messages if "max_logprobs" in message]
    assert len(lines) == 2 and all("\n" not in line for line in lines)
    assert "raw log-probabilities" in lines[0] + lines[1] and "processed log-probabilities" in lines[0] + lines[1]


def test_a_garbled_list_is_asked_for_again():
    """As another client's logprob_token_ids garbles it: the sampled token and token 0 at -9999."""
    good = {f"token_id:{i}": float(np.log(1 / 8)) for i in range(8)}
    bad = {"token_id:3": float(np.log(1 / 8)), "token_id:0": -9999.0}
    rows = [bad, bad, good]

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m"}]})

    async def completions(_: web.Request) -> web.Response:
        row = rows.pop(0)
        logprobs = {"tokens": ["token_id:3"], "token_logprobs": [row["token_id:3"]], "top_logprobs": [row]}
        return web.json_response({"choices": [{"index": 0, "logprobs": logprobs}]})

    async def run() -> tuple[Any, int]:
        async with serving(web.get("/v1/models", models), web.post("/v1/completions", completions)) as url:
            transport = HttpTransport(url, max_retries=2)
            engine = VLLMEngine(transport)
            try:
                return await engine.next_top_k([[1]], 8), transport.stats.retries
            finally:
                await engine.aclose()

    top, retries = asyncio.run(run())
    assert sorted(top.token_ids[0].tolist()) == list(range(8)) and retries == 2
    rows[:] = [bad] * 9
    with pytest.raises(EngineProtocolError, match="logprob_token_ids"):
        asyncio.run(run())


def test_weights_that_a_training_run_left_are_seen(tiny_models, small_urls):
    """By their name, and by a number that needs no name."""
    with WarmServer(tiny_models[0], ["--max-logprobs", "100", "--threads", "1"]) as server:

        def weights() -> dict[str, Any]:
            rows = report(server.url, small_urls[1])["checks"]
            return next(row for row in rows if (row["server"], row["name"]) == ("π_θ", "weights"))

        first = weights()
        assert first["status"] == "ok" and "default" in first["detail"]
        with DualRollout(CoordinatorConfig(theta_url=server.url, t_url=small_urls[1])) as rollout:
            rollout.reload_policy_weights(str(tiny_models[1]))
            unnamed = weights()
            rollout.share_policy_weights(7)
        named = weights()
    assert str(tiny_models[1]) in unnamed["detail"] and "restart the server" in unnamed["fix"]
    assert re.match(r"dual_rollout run [0-9a-f]{8}, step 7;", named["detail"]) and "restart the server" in named["fix"]
    texts = [row["detail"].split("fixed text ")[1] for row in (first, unnamed, named)]
    assert texts[0] != texts[1] == texts[2]
