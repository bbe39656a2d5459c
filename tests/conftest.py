"""For all tests."""

from __future__ import annotations

import os
import signal

# No test loads anything from a hub; where there is no way to it, asking would take the client a minute.
os.environ["HF_HUB_OFFLINE"] = "1"
# Nor do two workers and their servers gain anything by more threads than there are cores for.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Their own requests go to loopback addresses alone, which no proxy reaches. What is tested must not rely on it, see
# `test_a_proxy_...` in tests/unit/test_http.py and tests/integration.
os.environ["no_proxy"] = "*"
# A shell ignores SIGINT in what it starts in the background, and children inherit that: Ctrl-C could not be tested.
signal.signal(signal.SIGINT, signal.default_int_handler)
