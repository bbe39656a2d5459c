"""How a command ends: its exit status, and what it prints when it fails."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from dual_rollout.exceptions import DualRolloutError

DEBUG_VARIABLE = "DUAL_ROLLOUT_DEBUG"


def exit_status(command: str, run: Callable[[], int | None], *, debug: bool = False) -> int:
    """Run a command: its own status, or one message on stderr and 2 for a caller's mistake, 1 for a server's fault,
    130 for Ctrl-C.

    Anything else is a bug and keeps its traceback; with `debug`, or `DUAL_ROLLOUT_DEBUG` in the environment, all do.
    """
    try:
        return run() or 0
    except KeyboardInterrupt:
        if debug or os.environ.get(DEBUG_VARIABLE):
            raise
        print(f"{command}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except (ValueError, OSError, DualRolloutError) as error:
        if debug or os.environ.get(DEBUG_VARIABLE):
            raise
        print(f"{command}: error: {error}", file=sys.stderr)
        return 1 if isinstance(error, DualRolloutError) else 2
