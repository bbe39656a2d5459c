"""`dual-rollout doctor` and the probe against real vLLM."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conformance.suite import Target, use
from tests.integration.test_doctor import DEAD, failed, report
from tests.vllm.conftest import ServerPair
from tests.vllm.servers import VllmServer


@pytest.fixture(scope="module")
def bare_url(vllm_pair: ServerPair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that lacks what can be lacking."""
    flags = ("--max-logprobs=20", "--no-enable-prefix-caching", "--logprobs-mode=processed_logprobs")
    closed = {"VLLM_SERVER_DEV_MODE": "0", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "0"}
    log = tmp_path_factory.mktemp("bare") / "server.log"
    model = vllm_pair.t.model
    with VllmServer(model, flags=(*flags, "--disable-fastapi-docs"), environment=closed, log=log) as server:
        yield server.url


def at(url: str, pair: ServerPair) -> Target:
    return Target(url, url, pair.theta.model, pair.t.model)


def test_a_good_pair(vllm_pair: ServerPair, lora_url: str) -> None:
    found = report(lora_url, vllm_pair.t.url, "--top-k", "200")
    assert found["ok"]
    rows = {(check["server"], check["name"]): check["status"] for check in found["checks"]}
    assert rows["π_θ", "LoRA loading"] == rows["π_θ", "weight reload"] == rows["both", "tokens"] == "ok"
    assert (rows["π_θ", "sessions"], rows["π_t", "sessions"]) == ("ok", "optional")
    assert "LoRA loading" in str([c for c in report(vllm_pair.theta.url, vllm_pair.t.url)["checks"] if c["fix"]])


def test_misconfigured_and_dead_servers(bare_url: str, vllm_pair: ServerPair) -> None:
    assert failed(report(bare_url, vllm_pair.t.url, "--top-k", "21")) == [("π_θ", "top_k")]
    found = report(bare_url, DEAD, "--top-k", "20")
    assert failed(found) == [("π_t", "server")]
    rows = {check["name"]: check["status"] for check in found["checks"] if check["server"] == "π_θ"}
    missing = ("weight reload", "LoRA loading", "prefix caching")
    assert [rows[name] for name in missing] == ["optional"] * 3
    assert failed(report(bare_url, vllm_pair.t.url, "--top-k", "20", "--train")) == [("π_θ", "weight reload")]


def test_a_plain_server_is_no_native_one(vllm_pair: ServerPair) -> None:
    found = report(vllm_pair.theta.url, None)
    assert failed(found) == [("q*", "native")]
    assert "serve-native" in found["checks"][0]["detail"]


def test_a_server_without_schema_or_development_routes(bare_url: str, vllm_pair: ServerPair) -> None:
    found = use(at(bare_url, vllm_pair), lambda engine: engine.probe([3, 4, 5]))
    assert (found.max_logprobs, found.logprobs_mode, found.prefix_caching) == (20, "processed", False)
    assert not (found.reloads_weights or found.resets_prefix_cache or found.pauses or found.loads_lora)
    assert found.generate_endpoint and found.named_logprobs and found.detokenizes
    assert found.scoring[0] == "prompt_logprobs"


def test_the_older_runner_is_never_asked_for_rows_after_a_cache_hit(vllm_pair: ServerPair) -> None:
    """It dies of the question. Probing twice, with the prompt cached by then, leaves it alive."""
    for _ in range(2):
        found = use(at(vllm_pair.theta.url, vllm_pair), lambda engine: engine.probe(list(range(40, 140))))
        assert found.scoring[0] == ("token_ids" if found.cached_rows else "prefixes")
    assert vllm_pair.theta.is_alive()
    use(at(vllm_pair.theta.url, vllm_pair), lambda engine: engine.health())
