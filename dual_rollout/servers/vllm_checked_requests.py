"""Requests to a vLLM server that may be sent again, and whose answers are checked for what they say of themselves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from dual_rollout.exceptions import EngineProtocolError, EngineRejectedError
from dual_rollout.servers.http import HttpTransport, shown
from dual_rollout.servers.identity import ServerIdentity
from dual_rollout.servers.parsing import RequestIds, read_as

logger = logging.getLogger(__name__)

T = TypeVar("T")


class CheckedRequests:
    """Sends requests to one server, again as `RetryPolicy` says.

    Every request is numbered (`request_id`), and the answer must be to that one: a proxy may give an earlier answer
    again. Where a server does not repeat the number, the count of prompt tokens must fit.
    """

    def __init__(self, http: HttpTransport, identity: ServerIdentity):
        self._http = http
        self._identity = identity
        self._ids = RequestIds()

    async def ask(
        self,
        path: str,
        payload: Mapping[str, Any],
        read: Callable[[dict[str, Any]], T],
        *,
        model: Callable[[], str],
        models: Callable[[], set[str]],
        prompt_tokens: int,
        max_bytes: int,
        watched: bool = True,
    ) -> T:
        """What `read` makes of the answer.

        Args:
            read: raises `EngineProtocolError`, or one of `MALFORMED`, when it is of no use.
            model: the name to ask for, at the moment.
            models: names that the answer may give for its model.
            prompt_tokens: tokens of all prompts together.
            max_bytes: the longest answer that can be right.
            watched: the answer must be of the server that was there at first.

        Raises:
            EngineProtocolError: no answer was of use, however often the request was sent.
            EngineRestartedError: the server has lost the weights that it was given.
            EngineReplacedError: it serves another model than at first.
        """
        if watched:
            await self._identity.before_request()

        async def once() -> T:
            number, name = self._ids.next(), model()
            try:
                answer = await self._http.post(
                    path, {"model": name, **payload, "request_id": number}, max_bytes=max_bytes
                )
            except EngineRejectedError as error:
                # No model of that name: an adapter is lost, or the server was restarted under another name.
                if error.status == 404 and watched:
                    await self._identity.confirm()
                    if model() != name:
                        raise self._useless(f"no answer as {name!r}; it is called {model()!r} now") from error
                raise
            if watched:
                await self._identity.after_answer()
            self._check(path, answer, number, models(), prompt_tokens)
            return read_as(read, answer, self._http.url)

        return await self._http.retries.query(once)

    def _check(self, path: str, answer: Any, number: str, models: set[str], prompt_tokens: int) -> None:
        """Whether it is an answer to that request."""
        if not isinstance(answer, dict):
            raise self._useless("no JSON object")
        name = answer.get("id") or answer.get("request_id")
        if not self._ids.fit(path, name, number):
            raise self._useless(f"an answer to another request ({shown(name)})")
        model = answer.get("model")
        if isinstance(model, str) and model not in models:
            raise self._useless(f"an answer of the model {model:.80}")
        usage = answer.get("usage")
        counted = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if isinstance(counted, int) and counted != prompt_tokens:
            raise self._useless(f"an answer to {counted} prompt tokens instead of {prompt_tokens}")

    def _useless(self, what: str) -> EngineProtocolError:
        return EngineProtocolError(f"gave {what}", url=self._http.url)
