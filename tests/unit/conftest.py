"""Hypothesis draws the same examples on every run, so that a failure is a change of the code and not of the luck."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("reproducible", derandomize=True, deadline=None, max_examples=150)
settings.load_profile("reproducible")
