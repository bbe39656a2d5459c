"""The loops that turn two engines into one sampler of q*: no HTTP, no torch."""

from dual_rollout.decoding.decode import decode, decode_policy
from dual_rollout.decoding.native import NativeDecoder
from dual_rollout.decoding.outage import Outage
from dual_rollout.decoding.record import DecodingStats, OnToken, Recorder
from dual_rollout.decoding.scheduler import OnFinished
from dual_rollout.decoding.sequence import DecodingSequence
from dual_rollout.decoding.tuner import Choice, Tuner
from dual_rollout.decoding.weights import PolicyWeights

__all__ = [
    "Choice",
    "DecodingSequence",
    "DecodingStats",
    "NativeDecoder",
    "OnFinished",
    "OnToken",
    "Outage",
    "PolicyWeights",
    "Recorder",
    "Tuner",
    "decode",
    "decode_policy",
]
