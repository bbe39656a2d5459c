"""The conformance suite on real vLLM."""

from __future__ import annotations

import pytest

from tests.conformance.suite import EngineConformance, Target
from tests.vllm.conftest import ServerPair
from tests.vllm.servers import LORA_FLAGS


@pytest.fixture(scope="module")
def target(vllm_pair: ServerPair, request: pytest.FixtureRequest) -> Target:
    lora_url = request.getfixturevalue("lora_url") if LORA_FLAGS else None
    return Target(vllm_pair.theta.url, lora_url, vllm_pair.theta.model, vllm_pair.t.model)


class TestVLLM(EngineConformance):
    pass
