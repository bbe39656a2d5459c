"""The loops that turn two engines into one sampler of q*: no HTTP, no torch."""

from dual_rollout.decoding.decode import decode
from dual_rollout.decoding.native import NativeDecoder
from dual_rollout.decoding.record import DecodingStats, OnToken, Recorder
from dual_rollout.decoding.sequence import DecodingSequence
from dual_rollout.decoding.tuner import Choice, Tuner

__all__ = ["Choice", "DecodingSequence", "DecodingStats", "NativeDecoder", "OnToken", "Recorder", "Tuner", "decode"]
