"""The embedded server: vLLM's HTTP subset over plain transformers, for machines without a GPU and for tests.

Only ``launch`` is light; every other module here imports torch.
"""

from __future__ import annotations

SERVER_VERSION = "0.1.0+dual_rollout.embedded"
