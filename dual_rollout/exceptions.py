"""What can go wrong on the other side of the wire.

Mistakes of the caller (a bad value, an unknown key) are `ValueError`; everything here is a fault of a server or
of the way to it. Each message says what happened, at which server, and what to do.
"""

from __future__ import annotations


class DualRolloutError(Exception):
    """Base of all errors this package raises for faults that are not the caller's."""


class EngineError(DualRolloutError):
    """A server did not do what was asked. `url` is the server's base address."""

    def __init__(self, message: str, *, url: str):
        super().__init__(f"{url}: {message}")
        self.url = url


class EngineUnavailableError(EngineError):
    """No usable answer within the retries and time allowed (connection refused or reset, time-out, 429, 502-504)."""


class EngineReplacedError(EngineUnavailableError):
    """Another model is served at the address than at first; the one that is asked for is gone."""


class EngineRejectedError(EngineError):
    """The server understood the request and refused it (a 4xx other than 429). Repeating it cannot help."""

    def __init__(self, message: str, *, url: str, status: int):
        super().__init__(message, url=url)
        self.status = status


class EngineProtocolError(EngineError):
    """The answer is not what the API promises: broken JSON, missing rows, NaN log-probabilities."""


class EngineOversizedError(EngineError):
    """An answer is far longer than what was asked for can be. It is not read to its end, nor asked for again."""


class EngineRestartedError(EngineError):
    """The server is not the process that was given new weights, and serves others. It needs them again."""


class PreflightError(DualRolloutError):
    """The servers as configured cannot produce a correct rollout; raised before any token is generated."""


class WeightSyncError(DualRolloutError):
    """π_θ's server has not got the trainer's weights: they could not be written, or it serves others."""


class RolloutError(DualRolloutError):
    """Some sequences of a training rollout failed, and a training batch cannot have holes; or a sequence mixes
    versions of the weights."""
