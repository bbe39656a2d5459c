"""The conformance suite on the embedded server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dual_rollout.server.launch import EmbeddedServer
from tests.conformance.suite import MAX_LOGPROBS, MAX_MODEL_LEN, EngineConformance, Target


@pytest.fixture(scope="module")
def target(tiny_models: tuple[Path, Path]) -> Iterator[Target]:
    flags = ["--max-logprobs", str(MAX_LOGPROBS), "--max-model-len", str(MAX_MODEL_LEN), "--threads", "1"]
    with EmbeddedServer(tiny_models[0], [*flags, "--enable-lora"]) as server:
        yield Target(server.url, server.url, *tiny_models)


class TestEmbeddedServer(EngineConformance):
    pass
