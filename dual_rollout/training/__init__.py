"""Training with rollouts from q*: the only package that knows TRL."""
