"""Sessions on an ordinary vLLM server: a text stays in its engine, and each token is sent alone.

`vllm serve MODEL --middleware dual_rollout.sessions.route.SessionMiddleware` has them: `route.py`, in the API server's
process. `wire.py` is what both sides tell each other; the client is `dual_rollout.servers.sessions`.
"""
