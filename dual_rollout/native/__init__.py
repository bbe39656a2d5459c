"""One vLLM engine that samples from q* itself: the model class, its α solver and the columns that carry α and ψ.

`model.py` is the only file that imports vLLM. vLLM finds `register` through the entry point `vllm.general_plugins`.
"""

from __future__ import annotations

ARCHITECTURE = "DualRolloutForCausalLM"


def register() -> None:
    """Tell vLLM of the model class, by name: it is imported when a server needs it."""
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"dual_rollout.native.model:{ARCHITECTURE}")
