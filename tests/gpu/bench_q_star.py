"""What sampling from q* adds to a step of two models on a GPU: the solver against the matrix product before it.

python -m tests.gpu.bench_q_star
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dual_rollout.config import AlphaRule
from dual_rollout.native.ordinary_requests import q_star_logits
from tests.unit.test_native_q_star import choice

SHAPES = ((16, 49_152, 576), (16, 151_936, 1536), (64, 151_936, 1536), (64, 151_936, 3584), (256, 151_936, 3584))


def milliseconds(function: Callable[[], object], repeats: int = 50) -> float:
    """Median time of one call, replayed from a CUDA graph as vLLM does."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def main() -> None:
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    print(f"{'batch':>6}{'vocab':>9}{'hidden':>8}{'lm_head ms':>12}{'softmax ms':>12}{'eager ms':>10}{'fused ms':>10}")
    fused = torch.compile(q_star_logits)
    generator = torch.Generator("cuda").manual_seed(0)
    for batch, vocab, hidden in SHAPES:
        hidden_states = torch.randn(batch, hidden, device="cuda", dtype=torch.bfloat16, generator=generator)
        head = torch.randn(vocab, hidden, device="cuda", dtype=torch.bfloat16, generator=generator)
        logits = torch.randn(batch, vocab, device="cuda", generator=generator).mul_(3)
        nearby = (logits + 0.5 * torch.randn(batch, vocab, device="cuda", generator=generator)).bfloat16()
        logits, chosen = logits.bfloat16(), choice(batch, AlphaRule(), 1.0, "cuda")
        error = fused(logits, nearby, chosen) - q_star_logits(logits, nearby, chosen)
        assert error.abs().max() < 1e-3, error.abs().max()
        times = (
            milliseconds(lambda h=hidden_states, w=head: h @ w.T),
            milliseconds(lambda x=logits: x.float().log_softmax(1)),
            milliseconds(lambda x=logits, y=nearby, c=chosen: q_star_logits(x, y, c)),
            milliseconds(lambda x=logits, y=nearby, c=chosen: fused(x, y, c)),
        )
        cells = f"{times[0]:>12.3f}{times[1]:>12.3f}{times[2]:>10.3f}{times[3]:>10.3f}"
        print(f"{batch:>6}{vocab:>9}{hidden:>8}{cells}", flush=True)


if __name__ == "__main__":
    main()
