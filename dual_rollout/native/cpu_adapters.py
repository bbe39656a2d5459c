"""Rows without an adapter on vLLM's CPU build, which by itself (0.31, 0.32) computes them with one.

In a step where some request has an adapter, a row that has none is at place −1 of `--max-loras`. vLLM's kernels for
GPUs skip it; its CPU build takes −1 for the last place, and whatever adapter is there. For a target without an adapter
that would be the policy's, or one of its earlier versions: adapters that are unloaded stay in their places. vLLM's pull
request 48421 mends it there.
"""

from __future__ import annotations

from typing import Any

from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


def skip_rows_without_adapter() -> None:
    """Make vLLM's CPU build compute these by the model alone, in this process."""
    by_vllm = PunicaWrapperCPU.add_shrink

    def add_shrink(self: Any, y: Any, x: Any, *args: Any, **kwargs: Any) -> None:
        by_vllm(self, y, x, *args, **kwargs)
        has_adapter = (self.token_lora_indices >= 0)[:, None]
        for part in y:  # `(tokens, rank)` for each of the layers that vLLM computes as one
            part.view(-1, part.shape[-1]).mul_(has_adapter)

    PunicaWrapperCPU.add_shrink = add_shrink
