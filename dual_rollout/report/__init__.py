"""`dual-rollout report`: rollouts, token by token, as one page of HTML that needs no network."""
