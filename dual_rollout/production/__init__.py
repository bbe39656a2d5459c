"""Data production from q*: rows of an input in, shards with their sequences out, interrupted as often as may be."""
