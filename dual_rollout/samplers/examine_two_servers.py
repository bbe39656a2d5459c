"""What `doctor` says of a server for each of the two models; `two_servers.py` draws from them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal

from dual_rollout.config import CoordinatorConfig, longest_list
from dual_rollout.engine import Capabilities, Engine, EngineInfo
from dual_rollout.samplers.examination import LORA, Check, Examination, ability, answered, weights_check
from dual_rollout.sessions.wire import MIDDLEWARE, SCHEDULER
from dual_rollout.tokenizer_check import compare_tokens
from dual_rollout.tokenizer_files import Comparison
from dual_rollout.types import Role, TargetModel

_PROMPT = [1, 2, 3, 4]  # ids that any vocabulary has
_REFUSED = "speed: a rollout works without it; the server's own words say what it lacks"


class ServerPair:
    """The policy's server and the target's; implements `Servers`."""

    policy_name = "π_θ"
    list_settings: tuple[str, ...] = ("top_k", "support", "missing", "decoding")

    def __init__(self, config: CoordinatorConfig, theta: Engine, t: Engine):
        self.theta, self.t = theta, t
        self._config = config

    def in_words(self, describe: Callable[[Role], EngineInfo | None]) -> str:
        """See `Servers`."""
        theta, t = _kind(self._config.theta_engine, describe("theta")), _kind(self._config.t_engine, describe("t"))
        return "two embedded servers" if theta == t == _EMBEDDED else f"{theta}, {t}"

    async def target(self) -> TargetModel:
        """See `Servers`. One server may be both."""
        return TargetModel((await self.t.describe()).model, self.t.url == self.theta.url)

    async def examine(self) -> Examination:
        """See `Servers`."""
        config, deadline = self._config, asyncio.get_running_loop().time() + self._config.total_timeout
        named = (("π_θ", self.theta), ("π_t", self.t))
        found = await asyncio.gather(*(answered(engine.probe(_PROMPT), deadline) for _, engine in named))
        checks = [
            *_server_checks("π_θ", "theta_url", config.theta_url, found[0], config.top_k, takes_weights=True),
            *_server_checks("π_t", "t_url", config.t_url, found[1], config.top_k, takes_weights=False),
        ]
        theta, t = (None if isinstance(result, Exception) else result for result in found)
        for (name, engine), there in zip(named, (theta, t), strict=True):
            if there is not None:
                checks.append(await weights_check(name, engine, there.root, deadline))
                if (await engine.describe()).owned_by == "vllm":
                    checks.append(_sessions_check(name, there))
        if theta is not None and t is not None:
            checks.append(_models_check(config, theta, t))
            checks.append(_token_check(await answered(compare_tokens(self.theta, self.t, theta, t), deadline)))
        return Examination({"theta": _told(theta), "t": _told(t)}, checks)


_EMBEDDED = "embedded"


def _told(found: Capabilities | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found)


def _kind(engine: str, info: EngineInfo | None) -> str:
    """What serves a model: the kind that the config names, or "embedded" for a `dual-rollout serve`."""
    return _EMBEDDED if info is not None and info.owned_by == "dual_rollout" else engine


def _server_checks(
    name: str,
    flag: str,
    url: str | list[str],
    found: Capabilities | Exception,
    top_k: int | Literal["auto"],
    *,
    takes_weights: bool,
) -> list[Check]:
    """The rows of one server. `takes_weights`: those about new weights are among them."""
    if isinstance(found, Exception):
        fix = f"start the server, or correct {flag}; one that has just started compiles at first (--timeout 300)"
        return [Check(name, "server", "failed", str(found) or type(found).__name__, fix)]
    cap = found.max_logprobs
    asked = longest_list(top_k, cap)
    enough = cap is None or cap >= asked
    processed = found.logprobs_mode == "processed"
    return [
        Check(name, "server", "ok", f"{found.model} at {url}, version {found.version or 'unknown'}"),
        Check(name, "context", "ok", f"{found.max_model_len or 'unknown'} tokens"),
        Check(
            name,
            "top_k",
            "ok" if enough else "failed",
            f"{'auto, up to ' if top_k == 'auto' else ''}{asked} of at most {'any number' if cap is None else cap}",
            "" if enough else f"start it with --max-logprobs {asked}, or ask for less (--top-k {cap})",
        ),
        Check(
            name,
            "log-probabilities",
            "ok" if processed else "optional",
            found.logprobs_mode,
            "" if processed else "temperature != 1 needs --logprobs-mode processed_logprobs to be exact",
        ),
        ability(name, "named tokens", found.named_logprobs, 'missing="exact" needs a vLLM with logprob_token_ids'),
        ability(
            name,
            "prefix caching",
            found.prefix_caching,
            "speed: do not start it with --no-enable-prefix-caching"
            if found.prefix_caching is False
            else "speed: it does not say whether it caches; --enable-prompt-tokens-details shows it",
            "on",
        ),
        Check(name, "draft scoring", "ok", " or ".join(found.scoring)),
        *(Check(name, "refused", "optional", refusal, _REFUSED) for refusal in found.refused),
        *(_weight_sync_checks(name, found) if takes_weights else ()),
    ]


def _weight_sync_checks(name: str, found: Capabilities) -> list[Check]:
    reloads = found.reloads_weights and found.resets_prefix_cache
    needed = "training with dual_weight_sync=disk needs VLLM_SERVER_DEV_MODE=1"
    return [
        ability(name, "weight reload", reloads, needed),
        ability(name, "LoRA loading", found.loads_lora, LORA),
    ]


def _sessions_check(name: str, found: Capabilities) -> Check:
    """Whether a vLLM server keeps texts between requests."""
    flags = f"--middleware {MIDDLEWARE} --scheduler-cls {SCHEDULER}"
    return ability(
        name,
        "sessions",
        found.sessions,
        f"speed: lockstep is 1.6 to 4.6 times as fast with {flags}, which start_vllm.sh sets (docs/serving.md)",
    )


def _models_check(config: CoordinatorConfig, theta: Capabilities, t: Capabilities) -> Check:
    if config.theta_url == config.t_url and theta.model == t.model:
        fix = "α means nothing, unless π_t sees other prompts (t_prompts)"
        return Check("both", "two models", "optional", "one", fix)
    return Check("both", "two models", "ok", "yes")


def _token_check(compared: Comparison | Exception) -> Check:
    if isinstance(compared, Exception):
        return Check("both", "tokens", "optional", f"not checked: {compared}")
    detail = "; ".join([*compared.differences, *compared.notes])
    if compared.same is None:
        return Check("both", "tokens", "optional", detail, "make sure yourself that the tokenizers are the same")
    if not compared.same:
        return Check("both", "tokens", "failed", detail, "serve two models that have one tokenizer")
    return Check("both", "tokens", "ok", f"same{'; ' if detail else ''}{detail}")
