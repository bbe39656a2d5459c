"""Clients of inference servers: token ids in, arrays out, never raw JSON.

Another kind of server is a client here for the contract of `dual_rollout.engine`, as `VLLMEngine` and `SGLangEngine`
are, and a name for it in `from_config`. The small server for machines without a GPU is `dual_rollout.server`.
"""

from dual_rollout.engine import Capabilities, Drafts, Engine, EngineInfo
from dual_rollout.servers.http import HttpStats, HttpTransport
from dual_rollout.servers.replicas import Replicas
from dual_rollout.servers.sglang import SGLangEngine
from dual_rollout.servers.vllm import VLLMEngine

__all__ = [
    "Capabilities",
    "Drafts",
    "Engine",
    "EngineInfo",
    "HttpStats",
    "HttpTransport",
    "Replicas",
    "SGLangEngine",
    "VLLMEngine",
]
