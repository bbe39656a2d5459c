"""The exact distribution of rollouts on two real vLLM servers."""

from __future__ import annotations

import pytest

from tests.conformance.distribution import Pair, RolloutDistribution
from tests.vllm.conftest import ServerPair


@pytest.fixture
def pair(vllm_pair: ServerPair) -> Pair:
    return Pair(vllm_pair.theta.url, vllm_pair.t.url, vllm_pair.theta.model, vllm_pair.t.model)


class TestVLLM(RolloutDistribution):
    pass
