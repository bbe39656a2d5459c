"""For all tests."""

from __future__ import annotations

import os

# No test loads anything from a hub; where there is no way to it, asking would take the client a minute.
os.environ["HF_HUB_OFFLINE"] = "1"
