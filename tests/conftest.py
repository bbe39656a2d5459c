"""For all tests."""

from __future__ import annotations

import os

# No test loads anything from a hub; where there is no way to it, asking would take the client a minute.
os.environ["HF_HUB_OFFLINE"] = "1"
# Nor do two workers and their servers gain anything by more threads than there are cores for.
os.environ.setdefault("OMP_NUM_THREADS", "1")
