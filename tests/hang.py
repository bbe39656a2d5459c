"""The one limit of time in the tests, so that none depends on how fast or how busy the machine is."""

HANG = 1500.0
"""Seconds. What has not come by then never will: a test fails instead of holding up the suite."""
