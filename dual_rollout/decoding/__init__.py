"""The loops that turn two engines into one sampler of q*: no HTTP, no torch."""

from dual_rollout.decoding.lockstep import DecodingStats, decode_lockstep
from dual_rollout.decoding.sequence import DecodingSequence

__all__ = ["DecodingSequence", "DecodingStats", "decode_lockstep"]
