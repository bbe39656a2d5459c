"""One class per way to get sequences, chosen once from the config. Each checks its own servers first."""
