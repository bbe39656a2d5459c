"""The conformance suite on the embedded server, and on SGLang's stub with the distribution of the same model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dual_rollout.exceptions import EngineRejectedError
from dual_rollout.servers import SGLangEngine
from tests.conformance.suite import (
    MAX_LOGPROBS,
    MAX_MODEL_LEN,
    PROMPTS,
    EngineConformance,
    Target,
    assert_lists,
    distribution,
    logprobs_of,
    reference,
    use,
)
from tests.sglang_stub import NextTokenDistribution, SGLangStub
from tests.warm_servers import WarmServer


@pytest.fixture(scope="module")
def target(tiny_models: tuple[Path, Path]) -> Iterator[Target]:
    flags = ["--max-logprobs", str(MAX_LOGPROBS), "--max-model-len", str(MAX_MODEL_LEN), "--threads", "1"]
    with WarmServer(tiny_models[0], [*flags, "--enable-lora"]) as server:
        yield Target(server.url, server.url, *tiny_models)


@pytest.fixture(scope="module")
def sglang_target(tiny_models: tuple[Path, Path]) -> Iterator[Target]:
    stub = SGLangStub(
        model_distribution(tiny_models[0]),
        max_req_input_len=MAX_MODEL_LEN + 1,
        original_logprobs=True,
        enable_lora=True,
        binary_lists=True,
        load=lambda folder: model_distribution(Path(folder)),
    )
    with served(stub) as url:
        yield Target(url, url, *tiny_models, engine=SGLangEngine)


class TestEmbeddedServer(EngineConformance):
    def test_it_has_every_way_to_score(self, target: Target) -> None:
        found = use(target, lambda engine: engine.probe([1, 2]))
        assert (found.scoring, found.cached_rows, found.named_rows) == (("token_ids", "prefixes"), True, "per row")


class TestSGLang(EngineConformance):
    slower_scoring = ()
    accepts = ("full context", "no room for a draft", "list")
    absent_adapter = "absent"

    @pytest.fixture
    def target(self, sglang_target: Target) -> Target:
        return sglang_target

    def test_the_probe_finds_what_the_server_was_started_with(self, target: Target) -> None:
        found = use(target, lambda engine: engine.probe([1, 2]))
        assert (found.max_model_len, found.logprobs_mode, found.scoring) == (
            MAX_MODEL_LEN,
            "raw",
            ("token_ids", "prefixes"),
        )
        assert found.prefix_caching and found.named_logprobs and found.loads_lora and not found.named_rows

    def test_weights_that_are_not_there_are_noticed_before_a_reload(self, target: Target, tmp_path: Path) -> None:
        with pytest.raises(EngineRejectedError, match="does not see"):
            use(target, lambda engine: engine.reload_weights(str(tmp_path / "absent")))
        top = use(target, lambda engine: engine.next_top_k(PROMPTS, 20))
        assert_lists(top, [distribution(target.model, prompt) for prompt in PROMPTS], 20)

    test_requests_in_flight_never_see_half_loaded_weights = None  # type: ignore[assignment]  # answers one at a time
    test_prefix_cache_is_dropped = None  # type: ignore[assignment]  # the stub has none


@contextlib.contextmanager
def served(stub: SGLangStub) -> Iterator[str]:
    """The stub's URL, while it runs in a thread of its own."""
    loop, ready = asyncio.new_event_loop(), threading.Event()
    ended = asyncio.Event()

    async def run() -> None:
        async with stub.running():
            ready.set()
            await ended.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    try:
        assert ready.wait(100)
        yield stub.url
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
        loop.close()


def model_distribution(folder: Path) -> NextTokenDistribution:
    """The distribution of a model, or of a model with the adapter in `folder`; what was computed once is kept.

    Raises:
        OSError: there is neither.
    """
    if (folder / "adapter_config.json").exists():
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    elif (folder / "config.json").exists():
        model = reference(folder)
    else:
        raise FileNotFoundError(f"{folder} is absent")
    known: dict[tuple[int, ...], np.ndarray] = {}

    def next_token(text: Sequence[int]) -> np.ndarray:
        if tuple(text) not in known:
            for end, row in enumerate(np.exp(logprobs_of(model, text)), start=1):
                known[tuple(text[:end])] = row
        return known[tuple(text)]

    return next_token
