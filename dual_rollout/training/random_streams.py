"""The seeds of a trainer's rollouts: the same ones when the run is resumed, and other ones for evaluation."""

from __future__ import annotations

import numpy as np

_MODES = ("train", "eval", "loop")


class RandomStreams:
    """Seeds for one process."""

    def __init__(self) -> None:
        self._calls: dict[str, tuple[int, int]] = {}  # of each mode: the step, and the calls within it

    def next_seed(self, seed: int | None, mode: str, step: int, process: int) -> int | None:
        """The seed of the next call of its kind within the step.

        Args:
            seed: of the config; with None there is none, so that decoding is free to draft.
            mode: "train", "eval", or "loop" for a loop without a trainer, which is all of step 0.
        """
        last_step, calls = self._calls.get(mode, (step, 0))
        call = calls if last_step == step else 0
        self._calls[mode] = (step, call + 1)
        if seed is None:
            return None
        entropy = [seed, _MODES.index(mode), step, process, call]
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
