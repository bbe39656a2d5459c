"""The conformance suite on real vLLM."""

from __future__ import annotations

import pytest

from tests.conformance.suite import EngineConformance, Target
from tests.vllm.conftest import ServerPair


@pytest.fixture(scope="module")
def target(vllm_pair: ServerPair, lora_url: str) -> Target:
    return Target(vllm_pair.theta.url, lora_url, vllm_pair.theta.model, vllm_pair.t.model)


class TestVLLM(EngineConformance):
    pass
