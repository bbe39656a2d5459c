"""Sessions on an ordinary vLLM server: a text stays in its engine, and each token is sent alone.

In the API server's process, `route.py` (`--middleware dual_rollout.sessions.route.SessionMiddleware`) has the routes,
and `server.py` the sessions. In the engine's, `scheduler.py` lets those of a round go on at once (`--scheduler-cls
dual_rollout.sessions.scheduler.session_scheduler`). `wire.py` is what both sides tell each other; the client is
`dual_rollout.servers.vllm_sessions`.
"""
