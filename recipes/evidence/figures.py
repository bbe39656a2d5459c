"""Tables and figures of docs/evidence.md, from the results.

    python -m recipes.evidence.figures [--results FOLDER] [--docs docs/evidence.md]

Tables replace what stands between `<!-- table NAME -->` and `<!-- end -->` in the document; figures go beside it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recipes.evidence.arms import ARMS
from recipes.evidence.run import RESULTS, read

_RESAMPLES = 10_000
_CURVES = (
    "grpo",
    "kl_symmetry",
    "kl_budget",
    "fixed",
    "fixed_unweighted",
    "sft_grpo",
    "teacher",
    "distillation",
    "distillation_from_q",
    "answer_in_prompt",
)
_PARTS = ("rollout_s", "update_s", "seconds")
_OVER_TIME = (
    ("groups_without_signal", "groups without signal"),
    ("alpha", "α"),
    ("kl_theta", "KL(q‖π_θ), nats per token"),
    ("ess", "effective sample size"),
    ("pareto_k", "Pareto k̂"),
    ("clipped_share", "weights above 3"),
)


@dataclass(frozen=True)
class Result:
    """A finished run."""

    arm: str
    seed: int
    learning_rate: float
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    final: dict[str, Any]
    moved: dict[str, Any]

    @classmethod
    def from_file(cls, path: Path) -> Result:
        lines = read(path)

        def of_kind(kind: str) -> list[dict[str, Any]]:
            return [line for line in lines if line["kind"] == kind]

        (run,), (final,), (moved,) = of_kind("run"), of_kind("final"), of_kind("moved")
        return cls(run["arm"], run["seed"], run["learning_rate"], of_kind("step"), of_kind("evaluation"), final, moved)


def results_of(folder: Path) -> dict[str, list[Result]]:
    """By arm, in the order of the protocol."""
    found = [Result.from_file(path) for path in sorted(folder.glob("*.jsonl"))]
    return {arm: runs for arm in ARMS if (runs := [result for result in found if result.arm == arm])}


def mean_and_band(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean, and its 95% interval by resampling the values; both ends are the mean where there is one value."""
    array = np.asarray(values, dtype=float)
    drawn = np.random.default_rng(0).choice(array, (_RESAMPLES, len(array))).mean(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(array.mean()), float(low), float(high)


def success_table(results: dict[str, list[Result]]) -> str:
    """One row per arm, with 95% intervals over its seeds."""
    rows = [
        "| arm | learning rate | seeds | sampled | greedy | any of 4 | tokens sampled | s per update "
        "| KL to the start, nats a sequence |"
    ]
    rows.append("|---|---|---|---|---|---|---|---|---|")
    for arm, runs in results.items():
        cells = [
            _interval([run.final["sampled"] for run in runs], _percent),
            _interval([run.final["greedy"] for run in runs], _percent),
            _interval([run.final["ever"] for run in runs], _percent),
            f"{np.mean([run.evaluations[-1]['tokens'] for run in runs]) / 1000:.0f}k",
            f"{np.median([step['seconds'] for run in runs for step in run.steps]):.2f}",
            _interval([run.moved["kl_per_sequence"] for run in runs], "{:.1f}".format),
        ]
        rates = ", ".join(f"{rate:g}" for rate in sorted({run.learning_rate for run in runs}))
        rows.append(f"| `{arm}` | {rates} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(rows)


def sampling_table(results: dict[str, list[Result]]) -> str:
    """What the rollouts were like, over the first and the last tenth of the updates."""
    columns = (("reward", "reward"), *_OVER_TIME)
    rows = ["| arm | " + " | ".join(title for _, title in columns) + " |", "|---|" + "---|" * len(columns)]
    for arm, runs in results.items():
        cells = []
        for name, _ in columns:
            ends = []
            for part in (slice(None, 10), slice(-10, None)):
                values = [step[name] for run in runs for step in run.steps[part] if step.get(name) is not None]
                ends.append(f"{np.mean(values):.2f}" if values else "–")
            cells.append(" → ".join(ends))
        rows.append(f"| `{arm}` | {' | '.join(cells)} |")
    return "\n".join(rows)


def first_updates_table(results: dict[str, list[Result]], updates: int = 3) -> str:
    """What the rollouts are like while the policy is still the untrained one, within the learning rate's warm-up."""
    columns = (("reward", "reward"), *_OVER_TIME, ("weight", "mean weight, truncated"))
    rows = ["| arm | runs | " + " | ".join(title for _, title in columns) + " |", "|---|" + "---|" * (len(columns) + 1)]
    for arm, runs in results.items():
        cells = []
        for name, _ in columns:
            means = [np.mean([step[name] for step in run.steps[:updates] if name in step] or [np.nan]) for run in runs]
            cells.append("–" if np.isnan(means).all() else f"{np.nanmean(means):.3f}")
        rows.append(f"| `{arm}` | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(rows)


def rates_table(results: dict[str, list[Result]]) -> str:
    """Success before and after, one row per arm, learning rate and length."""
    rows = ["| arm | learning rate | updates | runs | before | after |", "|---|---|---|---|---|---|"]
    for arm, runs in results.items():
        for rate, updates in sorted({(run.learning_rate, len(run.steps)) for run in runs}):
            same = [run for run in runs if (run.learning_rate, len(run.steps)) == (rate, updates)]
            before = np.mean([run.evaluations[0]["sampled"] for run in same])
            after = np.mean([run.final["sampled"] for run in same])
            rows.append(f"| `{arm}` | {rate:g} | {updates} | {len(same)} | {_percent(before)} | {_percent(after)} |")
    return "\n".join(rows)


def step_times(folder: Path) -> dict[str, dict[str, list[float]]]:
    """By arm, the seconds of each step's parts without the first two steps, on a device that does nothing else."""
    found = {}
    for arm in ARMS:
        if (path := folder / f"{arm}.jsonl").exists():
            steps = [line for line in read(path) if line["kind"] == "step"][2:]
            found[arm] = {name: [step[name] for step in steps if name in step] for name in _PARTS}
    return found


def timing_table(folder: Path) -> str:
    """Medians of `step_times`."""
    rows = ["| arm | rollout, s | update, s | step, s |", "|---|---|---|---|"]
    for arm, parts in step_times(folder).items():
        # TRL's distillation trainer does not time its parts.
        cells = [f"{np.median(values):.2f}" if values else "–" for values in parts.values()]
        rows.append(f"| `{arm}` | {' | '.join(cells)} |")
    return "\n".join(rows)


def draw(results: dict[str, list[Result]], timing: Path, title: str, stem: Path) -> list[Path]:
    """Success against sampled tokens, and against seconds where `timing` has them, and the rollouts over the updates.

    Mean and band over seeds.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    seconds = {arm: np.median(parts["seconds"]) for arm, parts in step_times(timing).items()}
    figure, panels = plt.subplots(
        1, 1 + bool(seconds), figsize=(6.5 + 5.5 * bool(seconds), 4.5), layout="constrained", squeeze=False, sharey=True
    )
    for arm in (name for name in _CURVES if name in results):
        success = [[line["sampled"] for line in run.evaluations] for run in results[arm]]
        tokens = np.mean([[line["tokens"] for line in run.evaluations] for run in results[arm]], axis=0)
        (line,) = _band(panels[0, 0], tokens / 1000, success, arm)
        if arm in seconds:
            updates = np.array([line["step"] for line in results[arm][0].evaluations])
            _band(panels[0, 1], updates * seconds[arm], success, arm, color=line.get_color())
    panels[0, 0].set(
        xlabel="tokens sampled, thousands", ylabel="held-out success of the policy alone", title=title, ylim=(0, None)
    )
    if seconds:
        panels[0, 1].set(xlabel="seconds of training, both models' time, on a GPU that does nothing else")
    panels[0, 0].legend(fontsize=8)
    path = stem.with_name(f"{stem.name}-success.png")
    figure.savefig(path, dpi=120)
    plt.close(figure)

    figure, grid = plt.subplots(2, 3, figsize=(11, 5.5), layout="constrained")
    for axes, (name, label) in zip(grid.flat, _OVER_TIME, strict=True):
        for arm in _CURVES:
            rows = [[step.get(name, np.nan) for step in run.steps] for run in results.get(arm, [])]
            if rows and not np.isnan(np.asarray(rows, dtype=float)).all():
                _band(axes, np.arange(1, len(rows[0]) + 1), rows, arm)
        axes.set(xlabel="update", ylabel=label)
    grid[0, 0].legend(fontsize=6)
    rollouts = stem.with_name(f"{stem.name}-rollouts.png")
    figure.savefig(rollouts, dpi=100)
    plt.close(figure)
    return [path, rollouts]


def _band(axes: Any, x: np.ndarray, rows: Sequence[Sequence[float]], label: str, **style: Any) -> list[Any]:
    values = np.asarray(rows, dtype=float)
    drawn = np.random.default_rng(0).integers(len(values), size=(500, len(values)))
    with np.errstate(invalid="ignore"):
        low, high = np.nanquantile(values[drawn].mean(axis=1), [0.025, 0.975], axis=0)
    lines = axes.plot(x, values.mean(axis=0), label=label, linewidth=1.3, **style)
    axes.fill_between(x, low, high, alpha=0.15, color=lines[0].get_color(), linewidth=0)
    return lines


def _interval(values: Sequence[float], form: Callable[[float], str]) -> str:
    mean, low, high = mean_and_band(values)
    return f"{form(mean)} ({form(low)} to {form(high)})" if len(values) > 1 else form(mean)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def fill(text: str, tables: dict[str, str]) -> str:
    """The document with each marked table replaced."""
    for name, table in tables.items():
        text = re.sub(
            rf"(<!-- table {re.escape(name)} -->\n).*?(<!-- end -->)",
            lambda found, table=table: f"{found[1]}{table}\n{found[2]}",
            text,
            flags=re.DOTALL,
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=Path("docs/evidence.md"))
    options = parser.parse_args()
    tables = {}
    for folder in sorted(path for path in options.results.iterdir() if path.is_dir()):
        results = results_of(folder)
        tables[f"{folder.name} timing"] = timing_table(folder / "timing")
        others = results_of(folder / "other-rates")
        if others:
            tables[f"{folder.name} rates"] = rates_table(others)
        if results:
            tables[f"{folder.name} success"] = success_table(results)
            tables[f"{folder.name} rollouts"] = sampling_table(results)
            tables[f"{folder.name} first updates"] = first_updates_table(results)
            tables[f"{folder.name} tuning"] = rates_table(results_of(folder / "tuning"))
            for path in draw(
                results,
                folder / "timing",
                f"{folder.name}: mean and 95% band over seeds",
                options.docs.parent / f"evidence-{folder.name}",
            ):
                print(path)
    for name, table in tables.items():
        print(f"\n{name}\n{table}")
    if options.docs.exists():
        options.docs.write_text(fill(options.docs.read_text(), tables))


if __name__ == "__main__":
    main()
