"""The loops that sample from q*, for any engine that keeps the contract of `dual_rollout.engine`: no HTTP, no torch."""
