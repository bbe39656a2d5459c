"""From a config to its samplers: besides `config.py` the one place that asks for the kind of engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dual_rollout.config import NO_TARGET, CoordinatorConfig, url_list
from dual_rollout.decoding.stats import DecodingStats
from dual_rollout.decoding.tuner import Tuner
from dual_rollout.decoding.weight_version import PolicyWeights
from dual_rollout.native.client import NativeEngine
from dual_rollout.samplers.base import Sampler, Servers
from dual_rollout.samplers.examine_native import NativeServer
from dual_rollout.samplers.examine_two_servers import ServerPair
from dual_rollout.samplers.native import NativeSampler
from dual_rollout.samplers.policy_alone import PolicyAloneSampler
from dual_rollout.samplers.two_servers import TwoServerSampler
from dual_rollout.servers.from_config import Clients
from dual_rollout.servers.http import HttpStats


@dataclass(frozen=True, slots=True)
class Samplers:
    """What a coordinator draws with.

    Attributes:
        servers: the policy's server and that of the target at `t_url`.
        by_target: a sampler for each name of a target; None for the one at `t_url`, "none" for π_θ alone.
        traffic: requests and bytes of each server, "theta", "t" or the target's name.
        tuners: what chooses between lockstep and block, for "t_url" and each further target with a server of its own.
    """

    servers: Servers
    by_target: Mapping[str | None, Sampler]
    traffic: Mapping[str, HttpStats]
    tuners: dict[str, Tuner]


def choose_samplers(
    config: CoordinatorConfig, clients: Clients, weights: PolicyWeights, stats: DecodingStats
) -> Samplers:
    """The samplers of a config, with their clients."""
    traffic = {"theta": HttpStats(), "t": HttpStats(), **{name: HttpStats() for name in config.targets or {}}}
    if config.engine == "native":
        native = NativeEngine(clients.transport(url_list(config.theta_url)[0], traffic["theta"]), config.theta_model)
        alone = NativeSampler(native, weights, stats, without_target=True)
        both = {None: NativeSampler(native, weights, stats), NO_TARGET: alone}
        return Samplers(NativeServer(config, native), both, traffic, {})

    theta = clients.client(config.theta_engine, config.theta_url, config.theta_model, traffic["theta"])
    t = clients.client(config.t_engine, config.t_url, config.t_model, traffic["t"])
    between: dict[str | None, TwoServerSampler] = {None: TwoServerSampler(theta, t, "t_url", weights, stats)}
    for name, urls in (config.targets or {}).items():
        target = clients.client(config.t_engine, urls, None, traffic[name])
        between[name] = TwoServerSampler(theta, target, f"targets[{name!r}]", weights, stats)
    tuners = {name or "t_url": sampler.tuner for name, sampler in between.items()}
    by_target: dict[str | None, Sampler] = {**between, NO_TARGET: PolicyAloneSampler(theta, weights, stats)}
    return Samplers(ServerPair(config, theta, t), by_target, traffic, tuners)
