"""Several trainer processes: what fails in one fails in all, instead of leaving the others to wait for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from dual_rollout.exceptions import DualRolloutError


def process_index() -> int:
    """The number of this process among those of its run; 0 for the main one, and for the only one."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """Every process raises if the body failed in any of them; none leaves before all have come to its end.

    All processes must enter it, and the body must hold no collective operation: the failed process would miss it.

    Raises:
        DualRolloutError: the body failed in another process; it names the first one and its error. Where it failed,
            the body's own exception is raised.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    failures = gather_object([None if failure is None else f"{type(failure).__name__}: {failure}"])
    if failure is not None:
        raise failure
    for process, other in enumerate(failures):
        if other is not None:
            raise DualRolloutError(f"process {process} of {PartialState().num_processes} failed with {other}")
