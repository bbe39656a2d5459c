"""Before the first token: can these two servers give a correct rollout at all?"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from dual_rollout.config import CoordinatorConfig, longest_list
from dual_rollout.engine import TokenIds
from dual_rollout.exceptions import EngineProtocolError, EngineRejectedError, PreflightError
from dual_rollout.servers import Capabilities, Engine
from dual_rollout.tokenizer_check import compare_tokens

logger = logging.getLogger(__name__)

_TRIED_PROMPTS = 32
_TRIED_TOKENS = 64  # of a prompt; the probe too uses no more, so what is refused is not the prompt


async def check_servers(
    theta: Engine,
    t: Engine,
    config: CoordinatorConfig,
    contexts_theta: Sequence[TokenIds],
    contexts_t: Sequence[TokenIds],
    *,
    flag: str = "t_url",
) -> tuple[Capabilities, Capabilities]:
    """Probe both servers with the first real prompt that they take, and refuse what would go wrong later.

    Args:
        flag: where the config names π_t's server.

    Returns:
        What π_θ's server can do, and π_t's.

    Raises:
        PreflightError: the servers cannot serve what `config` asks; says which flag to set.
        EngineError: a server cannot be reached, or its answers are not usable.
    """
    if theta.url == t.url and config.theta_model == config.t_model and contexts_theta == contexts_t:
        logger.warning(
            "theta_url and %s are both %s, with the same prompts: π_θ and π_t are one model, and α means nothing",
            flag,
            theta.url,
        )
    found_theta = await _check_server(theta, contexts_theta, config, "theta_url")
    found_t = await _check_server(t, contexts_t, config, flag)
    if found_theta.vocab_size != found_t.vocab_size and None not in (found_theta.vocab_size, found_t.vocab_size):
        logger.info(
            "the vocabularies have %d and %d tokens: ids that only one model has are impossible under q*",
            found_theta.vocab_size,
            found_t.vocab_size,
        )
    comparison = await compare_tokens(theta, t, found_theta, found_t)
    for note in comparison.notes:
        logger.info("tokenizers: %s", note)
    if comparison.same is False:
        raise PreflightError(
            "π_θ and π_t do not speak the same tokens: "
            + "; ".join(comparison.differences)
            + ". Serve two models with one tokenizer."
        )
    return found_theta, found_t


class TemperatureCheck:
    """Whether servers take the temperatures that they are asked at: each one and each server once.

    They would refuse some in the middle of a run: vLLM takes anything below 0.01 as that, and nothing above 2.
    """

    def __init__(self) -> None:
        self._passed: set[tuple[str, float, bool]] = set()

    async def check(
        self, engine: Engine, temperature: float, contexts: Sequence[TokenIds], flag: str, *, draws: bool
    ) -> None:
        """Ask for a token at `temperature`, if the server is going to be asked for anything at that.

        Args:
            draws: whether tokens will be drawn; otherwise lists alone, which follow the temperature on some servers.

        Raises:
            PreflightError: it refuses the temperature, while it takes the same prompt at temperature 1.
        """
        if temperature == 1.0 or (engine.url, temperature, draws) in self._passed:
            return
        if draws or (await engine.probe(contexts[0])).logprobs_mode == "processed":
            await _draw_at(engine, temperature, contexts, flag)
        self._passed.add((engine.url, temperature, draws))


async def _draw_at(engine: Engine, temperature: float, contexts: Sequence[TokenIds], flag: str) -> None:
    for context in contexts[:_TRIED_PROMPTS]:
        try:
            await engine.draw_excluding([context[:_TRIED_TOKENS]], [[]], temperature, [0])
            return
        except EngineRejectedError as error:
            refusal = error
        try:
            await engine.draw_excluding([context[:_TRIED_TOKENS]], [[]], 1.0, [0])
        except EngineRejectedError:
            continue  # the prompt is to blame
        raise PreflightError(f"the server at {flag} refuses temperature {temperature:g}: {refusal}") from refusal


async def fingerprint(engine: Engine) -> float | None:
    """log-probability, nats, of a fixed text of token ids: the same for the same weights, up to rounding.

    It tells weights apart where a server does not name them. None from a server that does not score a text.
    """
    try:
        own, _ = await engine.score(_ANY_TEXT, 1)
    except (EngineRejectedError, EngineProtocolError):
        return None
    total = float(own.sum())
    return round(total, 3) if math.isfinite(total) else None


_ANY_TEXT = tuple(range(1, 17))  # ids that any vocabulary has


async def check_policy(theta: Engine, config: CoordinatorConfig, contexts: Sequence[TokenIds]) -> None:
    """The same for π_θ's server alone; cheap when repeated."""
    await _check_server(theta, contexts, config, "theta_url")


async def _check_server(
    engine: Engine, contexts: Sequence[TokenIds], config: CoordinatorConfig, flag: str
) -> Capabilities:
    capabilities, context = await _probe(engine, contexts, flag)
    cap = capabilities.max_logprobs
    k = longest_list(config.top_k, cap)
    if cap is not None and k > cap:
        raise PreflightError(
            f"top_k is {k}, but the server at {flag} ({engine.url}) gives at most {cap} log-probabilities. "
            f"Start it with --max-logprobs {k} or more, or lower top_k."
        )
    if config.missing == "exact" and not capabilities.named_logprobs:
        raise PreflightError(
            f'missing="exact" needs log-probabilities of named tokens (logprob_token_ids), which the server at {flag} '
            f'({engine.url}, version {capabilities.version or "unknown"}) lacks. Use a newer one, or missing="floor".'
        )
    try:
        await engine.next_top_k([context[:_TRIED_TOKENS]], k)
    except EngineRejectedError as error:
        raise PreflightError(
            f"the server at {flag} refuses a request for {k} log-probabilities: {error}. "
            f"Start it with --max-logprobs {k} or more, or lower top_k."
        ) from error
    return capabilities


async def _probe(engine: Engine, contexts: Sequence[TokenIds], flag: str) -> tuple[Capabilities, TokenIds]:
    """With the first prompt that the server takes: one that it refuses fails alone, when its turn comes."""
    refusal: EngineRejectedError | None = None
    for context in contexts[:_TRIED_PROMPTS]:
        try:
            return await engine.probe(context), context
        except EngineRejectedError as error:
            refusal = refusal or error
    raise PreflightError(f"the server at {flag} refuses an ordinary request: {refusal}") from refusal
