"""Sessions on an ordinary vLLM server: a text stays in its engine, and each token is sent alone.

`route.py` (`--middleware dual_rollout.sessions.route.SessionMiddleware`), in the API server's process, has the routes and
`server.py` the sessions.
`scheduler.py` (`--scheduler-cls dual_rollout.sessions.scheduler.session_scheduler`), in the engine's, lets those of a
round go on at once. `wire.py` is what both sides tell each other; the client is `dual_rollout.servers.vllm_sessions`.
"""
