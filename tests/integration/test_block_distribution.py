"""The exact distribution of rollouts on two embedded servers."""

from __future__ import annotations

import pytest

from tests.conformance.distribution import Pair, RolloutDistribution
from tests.integration.conftest import TinyPair


@pytest.fixture
def pair(tiny_pair: TinyPair) -> Pair:
    return Pair(tiny_pair.theta_url, tiny_pair.t_url, tiny_pair.theta_model, tiny_pair.t_model)


class TestEmbeddedServers(RolloutDistribution):
    pass
