"""Clients of inference servers. They take and return token ids and arrays, never raw JSON."""

from dual_rollout.engines.base import Engine, EngineInfo
from dual_rollout.engines.http import HttpStats, HttpTransport
from dual_rollout.engines.vllm import VLLMEngine

__all__ = ["Engine", "EngineInfo", "HttpStats", "HttpTransport", "VLLMEngine"]
