"""One vLLM engine that samples from q* itself, in two ways; docs/native.md says when to use which.

Two models, one prompt: `model.py` (the model class, which returns the logits of q*) and `solver.py`. vLLM finds
`register` through the entry point `vllm.general_plugins`.

Pairs, one model with two prompts: `route.py` (the HTTP route), `scheduler.py` (both requests come at once),
`processor.py` and `table.py` (which rows are a pair), `draw.py`, `alpha.py` and `kernel.py` (α, q* and the draw),
`rule.py` (what a request says). `serving.py` starts the server of either.
"""

from __future__ import annotations

ARCHITECTURE = "DualRolloutForCausalLM"


def register() -> None:
    """Tell vLLM of the model class, by name: it is imported when a server needs it."""
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"dual_rollout.native.model:{ARCHITECTURE}")
