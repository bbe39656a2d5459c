"""The native engine's solver on a GPU: the same numbers as on the CPU, and nothing that a CUDA graph cannot hold."""

from __future__ import annotations

import pytest
import torch

from dual_rollout.native.ordinary_requests import q_star_logits
from dual_rollout.native.q_star import QStar
from tests.unit.test_native_q_star import BALANCED, alpha_error, choice, kl_difference, pair, q_star


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_same_as_the_reference(dtype: torch.dtype, temperature: float) -> None:
    theta, t = (logits.to(dtype) for logits in pair(64, 49_152, 3.0, 0.95))
    q = QStar(*(part.cpu() for part in q_star(theta.cuda(), t.cuda(), BALANCED, temperature)))
    theta, t = theta.float(), t.float()
    assert alpha_error(theta, t, temperature, q).max() < 1e-4
    assert kl_difference(theta, t, q.alpha, temperature).max() < 1e-4
    logp_theta, logp_t = ((logits.double() / temperature).log_softmax(1) for logits in (theta, t))
    log_q = ((1 - q.alpha.double()) * logp_theta + q.alpha.double() * logp_t).log_softmax(1)
    assert (q.logprobs - log_q).abs().max() < 5e-5


def test_a_cuda_graph_replays_it() -> None:
    """Capture fails at any synchronisation with the host."""
    logits = [pair(32, 5000, 3.0, 0.9, seed=seed) for seed in (0, 1)]
    theta, t = (part.cuda() for part in logits[0])
    chosen = choice(32, BALANCED, 1.0, "cuda")
    q_star_logits(theta, t, chosen)  # kernels are loaded outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        served = q_star_logits(theta, t, chosen)
    for new_theta, new_t in logits:
        theta.copy_(new_theta)
        t.copy_(new_t)
        graph.replay()
        expected = q_star_logits(theta, t, chosen)
        assert torch.equal(served, expected)
