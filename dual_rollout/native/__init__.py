"""One vLLM engine that draws whole rollouts from q*, and its client; docs/native.md says how it works.

What the client needs, without torch and vLLM: `wire.py` (what both sides tell each other), `client.py`, `capacity.py`.

In the API server: `route.py` (the HTTP route), `refusals.py`. In the engine: `scheduler.py` (both requests of a rollout
come at once), `processor.py` and `table.py` (which rows are drawn together), `draw.py`, `q_star.py`, `alpha_methods.py`
and `kernel.py` (α, q* and the draw), `ordinary_requests.py` (other requests, where these are drawn from q* too),
`model.py` (the class that holds two models, which vLLM finds by `register`, through the entry point
`vllm.general_plugins`). `serving.py` starts it all.
"""

from __future__ import annotations

ARCHITECTURE = "DualRolloutForCausalLM"


def register() -> None:
    """Tell vLLM of the class that holds two models, by name: it is imported when a server needs it."""
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"dual_rollout.native.model:{ARCHITECTURE}")
