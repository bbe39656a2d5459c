"""Clients of inference servers. They take and return token ids and arrays, never raw JSON."""

from dual_rollout.engine import Capabilities, Drafts, Engine, EngineInfo
from dual_rollout.servers.http import HttpStats, HttpTransport
from dual_rollout.servers.native import NativeEngine
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
    "NativeEngine",
    "Replicas",
    "SGLangEngine",
    "VLLMEngine",
]
