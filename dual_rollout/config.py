"""Everything a rollout can be told, in one dataclass."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple, Self, get_type_hints
from urllib.parse import urlsplit

from dual_rollout.field_types import expected, fits

NO_TARGET = "none"
"""The name, in `targets` of a call, of no target: plain generation from π_θ."""


MAX_AUTO_TOP_K = 1000
"""What `top_k: auto` asks for at most, where the server sets no lower limit."""


def longest_list(top_k: int | Literal["auto"], max_logprobs: int | None) -> int:
    """The tokens that a server is asked for at most.

    Args:
        top_k: the config's.
        max_logprobs: what the server gives at most; None for any number.
    """
    return min(max_logprobs or MAX_AUTO_TOP_K, MAX_AUTO_TOP_K) if top_k == "auto" else top_k


NATIVE_TEMPERATURES = (0.01, 100.0)
"""What a native server takes."""


EngineKind = Literal["dual", "native"]
ServerKind = Literal["vllm", "sglang"]
AlphaMethod = Literal["kl_symmetry", "fixed", "ess_balance", "entropy", "kl_budget"]
"""How α is chosen for each token: `functional.kl_symmetry` and `functional.alpha_methods` say what each is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AlphaRule:
    """How α is chosen for each token: of a config, of a call, of a request to a native server. All are checked here.

    Attributes:
        alpha_method: see `AlphaMethod`.
        fixed_alpha: the α of "fixed", in [0, 1].
        kl_budget: the bound of "kl_budget" on KL(q_α‖π_θ), nats.
        alpha_min, alpha_max: bounds on α, whatever the method says.

    Raises:
        ValueError: a value out of range, or one that belongs to another method; it names the field.
    """

    alpha_method: AlphaMethod = "kl_symmetry"
    fixed_alpha: float | None = None
    kl_budget: float | None = None
    alpha_min: float = 0.0
    alpha_max: float = 1.0

    def __post_init__(self) -> None:
        _check_value("alpha_method", self.alpha_method, AlphaMethod, None)
        for name, method, bound in (("fixed_alpha", "fixed", _SHARE), ("kl_budget", "kl_budget", _BUDGET)):
            value = getattr(self, name)
            _check_value(name, value, float | None, bound)
            if self.alpha_method == method and value is None:
                raise ValueError(f'{name} must be set with alpha_method "{method}"')
            if self.alpha_method != method and value is not None:
                raise ValueError(f'{name} is set, but alpha_method is not "{method}": set one or drop the other')
        for name in ("alpha_min", "alpha_max"):
            _check_value(name, getattr(self, name), float, _SHARE)
        if self.alpha_min > self.alpha_max:
            raise ValueError(f"alpha_min ({self.alpha_min}) must not exceed alpha_max ({self.alpha_max})")


class _Bound(NamedTuple):
    """Which numbers, or texts, a field takes of those of its type."""

    words: str
    holds: Callable[[Any], bool]
    of: tuple[type, ...] = (int, float)

    def refuses(self, value: Any) -> bool:
        return isinstance(value, self.of) and not self.holds(value)


_NAME = _Bound("a name", bool, (str,))
_FROM_0 = _Bound("a whole number >= 0", lambda value: value >= 0)
_FROM_1 = _Bound("a whole number >= 1", lambda value: value >= 1)
_ABOVE_0 = _Bound("a finite number > 0", lambda value: 0 < value < math.inf)
_SHARE = _Bound("a number in [0, 1]", lambda value: 0 <= value <= 1)
_BETWEEN_0_AND_1 = _Bound("a number in (0, 1)", lambda value: 0 < value < 1)
_BUDGET = _Bound("a finite number >= 0", lambda value: 0 <= value < math.inf)


def _option(default: Any, help: str, bound: _Bound | None = None) -> Any:
    return field(default=default, metadata={"help": help, "bound": bound})


@dataclass(frozen=True, kw_only=True)
class CoordinatorConfig:
    """How to sample from q* between two servers. Validated at construction; frozen, picklable.

    Raises:
        ValueError: a value out of range, naming the field and what to set it to; an unknown field, naming the nearest.
    """

    engine: EngineKind = _option(
        "dual",
        '"dual": a server for each model. "native": one server at theta_url that samples from q* itself (dual-rollout '
        "serve-native); t_url, top_k, support, missing and decoding then mean nothing.",
    )
    theta_url: str | list[str] = _option(
        "http://127.0.0.1:8000", "Base URL of the policy's server (π_θ), or several of replicas."
    )
    t_url: str | list[str] = _option(
        "http://127.0.0.1:8001", "Base URL of the target's server (π_t), or several of replicas."
    )
    theta_engine: ServerKind = _option("vllm", "What serves π_θ.")
    targets: dict[str, str | list[str]] | None = _option(
        None, "Further targets by name: URLs of their servers, all of t_engine. generate_batch takes the names."
    )
    on_target_failure: Literal["fail", "policy", "wait"] = _option(
        "fail",
        'When π_t is gone for longer than the retries allow: "fail" ends the sequences with an error. "policy" goes on '
        'from π_θ alone (α = 0, weight 1, each such token marked). "wait" tries for ever.',
    )
    t_engine: ServerKind = _option("vllm", "What serves π_t.")
    theta_model: str | None = _option(None, "Served model name of π_θ; asked from the server when unset.", _NAME)
    t_model: str | None = _option(
        None,
        'Served model name of π_t; asked from the server when unset. With engine "native" the name of a LoRA adapter '
        "there, or of its model, which it is when unset.",
        _NAME,
    )
    tokenizer: str | None = _option(None, "Tokenizer name or path; taken from π_θ's model when unset.", _NAME)
    parse_special_tokens: bool = _option(
        False,
        "Whether a special token's name inside a prompt's text, such as <|im_start|>, is that token; otherwise it is "
        "the characters it is written with, and only the chat template places special tokens.",
    )
    long_prompts: Literal["refuse", "truncate_left"] = _option(
        "refuse",
        'A prompt that leaves no room for max_tokens in a server\'s context: "refuse" gives its output an error, '
        '"truncate_left" drops tokens at its beginning, which is logged and counted.',
    )
    top_k: int | Literal["auto"] = _option(
        100,
        'Candidates asked from each server; at most the servers\' --max-logprobs. "auto" asks at each position for as '
        'many as hold top_k_mass, and needs support "tail", with which the weights are unbiased at any number.',
        _FROM_1,
    )
    top_k_mass: float = _option(
        0.95, 'Mass of each list with top_k "auto", where the servers\' --max-logprobs allows.', _BETWEEN_0_AND_1
    )
    support: Literal["union", "tail"] = _option(
        "union", 'Mass outside both lists: "union" truncates and renormalises, "tail" keeps it as one atom.'
    )
    missing: Literal["floor", "exact"] = _option(
        "floor", 'A candidate one list lacks: "floor" bounds it by that list, "exact" asks the server for it.'
    )
    decoding: Literal["auto", "lockstep", "block"] = _option(
        "auto",
        'How positions are asked for: "lockstep" one by one, "block" with drafts of π_θ, "auto" what is measured to be '
        "fastest. All draw from the same distribution.",
    )
    num_draft_tokens: int | None = _option(
        None, "Tokens per draft at most; adapted to the measured acceptance when unset.", _FROM_1
    )
    alpha_method: AlphaMethod = _option(
        "kl_symmetry",
        'How α is chosen per token: "kl_symmetry" (equally far from both), "fixed", "ess_balance" (equal effective '
        'sample sizes), "entropy" (the surer model has the larger say), "kl_budget" (as far from π_θ as allowed).',
    )
    fixed_alpha: float | None = _option(None, 'The α of alpha_method "fixed", in [0, 1].', _SHARE)
    kl_budget: float | None = _option(
        None, 'The bound of alpha_method "kl_budget" on KL(q‖π_θ) per token, in nats.', _BUDGET
    )
    alpha_min: float = _option(0.0, "Lower bound on α, whatever the method says.", _SHARE)
    alpha_max: float = _option(1.0, "Upper bound on α, whatever the method says.", _SHARE)
    temperature: float = _option(1.0, "Divides both models' logits before the geometric path.", _ABOVE_0)
    seed: int | None = _option(None, "Seed of all random streams; fresh ones each call when unset.", _FROM_0)
    ignore_eos: bool = _option(False, "Do not stop at EOS.")
    max_concurrency: int | None = _option(
        None,
        "Sequences in flight at once; when unset 64, and 256 on a native server, as far as it has places.",
        _FROM_1,
    )
    max_retries: int = _option(5, "Times that one request is sent again, whatever went wrong (docs/scale.md).", _FROM_0)
    request_timeout: float = _option(120.0, "Seconds one attempt of a request may take.", _ABOVE_0)
    total_timeout: float = _option(600.0, "Seconds one request may take with all its repeats.", _ABOVE_0)
    connection_pool_size: int | None = _option(
        None, "Open connections per server; as many as sequences in flight when unset.", _FROM_1
    )
    show_progress: bool = _option(False, "Show a progress bar.")

    def __new__(cls, **values: Any) -> Self:
        cls._check_keys(values)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in ("theta_url", "t_url"):
            object.__setattr__(self, name, _checked_urls(name, getattr(self, name)))
        object.__setattr__(self, "targets", _checked_targets(self.targets))
        for spec in fields(self):
            _check_value(spec.name, getattr(self, spec.name), field_hints()[spec.name], spec.metadata["bound"])
        if self.top_k == "auto" and self.support != "tail":
            raise ValueError(
                'top_k "auto" lists fewer tokens where they are surer, which support "union" would cut off for good: '
                'set support to "tail"'
            )
        _ = self.alpha_rule  # which checks itself
        if self.engine == "native":
            self._check_native()

    def _check_native(self) -> None:
        if not isinstance(self.theta_url, str) or self.targets:
            raise ValueError('engine "native" has one server, which holds its target: give one theta_url, no targets')
        low, high = NATIVE_TEMPERATURES
        if not low <= self.temperature <= high:
            raise ValueError(f'temperature must be in [{low:g}, {high:g}] with engine "native", got {self.temperature}')

    @functools.cached_property  # every round of decoding asks for it
    def alpha_rule(self) -> AlphaRule:
        """How α is chosen for each token."""
        return AlphaRule(**{spec.name: getattr(self, spec.name) for spec in fields(AlphaRule)})

    @property
    def concurrency(self) -> int:
        """`max_concurrency`, or what it is when unset."""
        return self.max_concurrency or (256 if self.engine == "native" else 64)

    def with_alpha_rule(self, rule: AlphaRule) -> CoordinatorConfig:
        """The same with another rule for α."""
        return replace(self, **asdict(rule))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CoordinatorConfig:
        """A config from plain key-value pairs; keys that are no fields, whatever they are, are a `ValueError`."""
        cls._check_keys(values)
        return cls(**values)

    @classmethod
    def _check_keys(cls, keys: Iterable[Any]) -> None:
        names = [spec.name for spec in fields(cls)]
        for key in keys:
            if key not in names:
                raise ValueError(f"unknown key {key!r} in CoordinatorConfig{did_you_mean(str(key), names)}")


@functools.cache
def field_hints() -> dict[str, Any]:
    """The types of the fields of `CoordinatorConfig`."""
    return get_type_hints(CoordinatorConfig)


def _check_value(name: str, value: Any, hint: Any, bound: _Bound | None) -> None:
    if not fits(value, hint) or (bound is not None and bound.refuses(value)):
        raise ValueError(f"{name} must be {expected(hint, bound and bound.words)}, got {value!r:.80}")


@dataclass(frozen=True, slots=True)
class EngineServers:
    """How the servers of an engine are named.

    Attributes:
        fields: of `CoordinatorConfig`, that hold their URLs.
        can_be_embedded: whether a `dual-rollout serve`, which holds one model, can be each of them.
        missing: what to set where one is not named; `{prefix}` comes before the names of fields.
    """

    fields: tuple[str, ...]
    can_be_embedded: bool
    missing: str


ENGINE_SERVERS: Mapping[str, EngineServers] = {
    "dual": EngineServers(
        ("theta_url", "t_url"), True, "both {prefix}theta_url and {prefix}t_url, or neither to start embedded servers"
    ),
    "native": EngineServers(
        ("theta_url",), False, "{prefix}theta_url to the server that holds both models (dual-rollout serve-native)"
    ),
}


def url_list(urls: str | list[str]) -> list[str]:
    """One or several URLs as a list."""
    return [urls] if isinstance(urls, str) else list(urls)


def _checked_urls(name: str, urls: Any) -> str | list[str]:
    """Base URLs without a trailing "/v1"; a plain string where there is one alone."""
    if not isinstance(urls, (str, list, tuple)) or not urls:
        raise ValueError(f"{name} must be a URL such as http://127.0.0.1:8000, or a list of them, got {urls!r}")
    checked = [_checked_url(name, url) for url in ([urls] if isinstance(urls, str) else urls)]
    if len(set(checked)) < len(checked):
        raise ValueError(f"{name} names a server twice: {', '.join(checked)}")
    return checked[0] if len(checked) == 1 else checked


def _checked_url(name: str, url: Any) -> str:
    try:
        parts = urlsplit(url if isinstance(url, str) else "")
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and url.isprintable()
    except ValueError:  # a port that is no number
        parts, valid = urlsplit(""), False
    if isinstance(url, str) and "@" in url:
        raise ValueError(f"{name} must not hold a user name or password: set DUAL_ROLLOUT_API_KEY instead")
    if not valid:
        raise ValueError(f"{name} must be a URL such as http://127.0.0.1:8000, got {url!r}")
    if parts.query or parts.fragment:
        raise ValueError(f"{name} must end before any ? or #: {parts.scheme}://{parts.netloc}{parts.path}")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def _checked_targets(targets: Any) -> dict[str, str | list[str]] | None:
    if targets is None:
        return None
    if not isinstance(targets, Mapping) or not all(isinstance(name, str) and name for name in targets):
        raise ValueError(f"targets must map names to URLs, got {targets!r}")
    if NO_TARGET in targets:
        raise ValueError(f"targets: the name {NO_TARGET!r} stands for no target; choose another")
    return {name: _checked_urls(f"targets[{name!r}]", urls) for name, urls in targets.items()}


def did_you_mean(key: str, names: list[str]) -> str:
    """The tail of an error message about an unknown key: the nearest of `names`, or nothing when none is near."""
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
