"""What a model card says about the rollouts a model was trained with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from dual_rollout import __version__
from dual_rollout.config import NO_TARGET
from dual_rollout.training.connections import ADAPTER_NAME
from dual_rollout.training.contexts import T_PROMPT_COLUMN, T_TARGET_COLUMN
from dual_rollout.training.weight_sync import LoraWeightSync

_BEFORE = "### Framework versions"
"""The heading of TRL's card in front of which the section stands."""

_ALPHA = ("alpha_method", "fixed_alpha", "kl_budget", "alpha_min", "alpha_max")


def rollout_section(trainer: Any, mode: str, clip: Mapping[str, float]) -> str:
    """Markdown: what q* was, between which models, and how its weights entered the loss. Names no server.

    Args:
        trainer: a `DualTrainerMixin`, whose servers are asked for their models' names unless they have been before. A
            name is "unknown" while its server does not answer.
        mode, clip: how it applies importance weights.
    """
    config, schedule = trainer.rollout.config, trainer.rollout.schedule
    routes = _routes(trainer)
    named = sorted(name for name in routes if name not in (None, NO_TARGET))
    alpha = {name: getattr(config, name) for name in _ALPHA if getattr(config, name) is not None}
    settings = {**alpha, **trainer.rollout.list_settings}
    settings["temperature"] = trainer.temperature
    for name, end in schedule.ends.items():
        settings[name] = f"{settings[name]} to {end}, {schedule.shape} over the training steps"
    rows = {
        "policy π_θ": _without_folders(trainer.rollout.served_model("theta")),
        "target π_t": _target(trainer, routes),
        **({"further targets": ", ".join(named)} if named else {}),
        **({"rows without a target": "drawn from π_θ"} if NO_TARGET in routes else {}),
        "servers": trainer.rollout.servers_in_words(),
        **{f"`{name}`": value for name, value in settings.items()},
        "weights π_θ/q\\* in the loss": _correction(trainer, mode, clip),
    }
    none = rows["weights π_θ/q\\* in the loss"] == "none"
    effect = "no importance weight enters the loss" if none else _CORRECTED
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return _SECTION.format(version=__version__, table=table, effect=effect)


def add_to_card(path: Path, section: str) -> None:
    """Put the section into the model card that TRL has written at `path`."""
    before, heading, after = path.read_text(encoding="utf-8").partition(_BEFORE)
    path.write_text(f"{before}{section}\n{heading}{after}", encoding="utf-8")


def _correction(trainer: Any, mode: str, clip: Mapping[str, float]) -> str:
    args = trainer.args
    if trainer.use_vllm:
        if not args.vllm_importance_sampling_correction:
            return "none"
        return f"{args.vllm_importance_sampling_mode}, by TRL"
    return mode if mode == "none" else f"{mode}, bounds {clip['clip_min']:g} and {clip['clip_max']:g}"


def _routes(trainer: Any) -> set[Any]:
    """The targets that rows of the training dataset name, None for the one at `t_url`; of a stream, all there are."""
    dataset = trainer.train_dataset
    if not isinstance(dataset, Dataset):
        return {None, *(trainer.rollout.config.targets or {})}
    return set(dataset.unique(T_TARGET_COLUMN)) if T_TARGET_COLUMN in dataset.column_names else {None}


def _target(trainer: Any, routes: set[Any]) -> str:
    if None not in routes:
        return "none but those that rows name"
    columns = getattr(trainer.train_dataset, "column_names", None) or []
    notes = [_without_folders(trainer.rollout.served_model("t"))]
    if T_PROMPT_COLUMN in columns:
        notes.append("which saw prompts of its own")
    if _target_follows(trainer):
        notes.append("with the policy's weights of each moment")
    return ", ".join(notes)


def _target_follows(trainer: Any) -> bool:
    """Whether each weight sync was of the target too."""
    target = trainer.rollout.target()
    sends_all = not isinstance(trainer._weight_sync, LoraWeightSync)
    return target is not None and (target.model == ADAPTER_NAME or (target.gets_policys_weights and sends_all))


def _without_folders(model: str) -> str:
    """A folder's last part, for paths are nobody's business; a name on a hub as it is."""
    return Path(model).name if Path(model).is_absolute() else model


_CORRECTED = "their importance weights π_θ/q\\* correct the policy gradient"

_SECTION = """### Rollouts

The completions it was trained on were not drawn from the policy π_θ alone. `dual_rollout` {version} drew them, token by
token, from

$$q^*(y) \\propto \\pi_\\theta(y)^{{1-\\alpha}}\\,\\pi_t(y)^{{\\alpha}}$$

between the policy and a target model π_t, and {effect}.

| | |
|---|---|
{table}
"""
