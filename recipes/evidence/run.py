"""Does it help? The runs that docs/evidence.md reports.

    python -m recipes.evidence.run                  # SmolLM2, on one GPU
    python -m recipes.evidence.run --scale cpu      # a small model made from scratch, on two CPU cores
    python -m recipes.evidence.figures              # tables and figures from the results

A task's teacher is trained, then each arm's learning rate is tuned, then the arms are run seed by seed. Started again,
it goes on with what has no finished result at that rate. Each run is one file of JSON lines.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import queue
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from recipes.evidence.arms import ARMS, SCALES, TUNING_SEED, Scale
from recipes.evidence.tasks import TASKS

RESULTS = Path(__file__).parent / "results"
MODEL = Path("outputs/models/SmolLM2-135M-Instruct")
_DRAWS, _WORKED, _TIMING_STEPS = 8, 8_000, 8


@dataclass(frozen=True)
class Run:
    """One training run, and where its result is."""

    task: str
    arm: str
    seed: int
    learning_rate: float
    steps: int
    path: Path

    @property
    def is_done(self) -> bool:
        return self.path.exists() and read(self.path)[0]["learning_rate"] == _short(self.learning_rate)


@dataclass(frozen=True)
class Teacher:
    """A task's teacher, to be trained: its figures go to `path`, its weights to `folder`."""

    task: str
    path: Path
    folder: Path

    @property
    def is_done(self) -> bool:
        return self.path.exists() and (self.folder / "model.safetensors").exists()


def main() -> None:
    options = parse()
    pool = _Pool(options)
    try:
        pool.do(
            Teacher(task, options.results / task / "task.json", options.work / task / "teacher")
            for task in options.tasks
        )
        if options.timing:
            pool.do(timing_runs(options))
            return
        if SCALES[options.scale].tuning_steps:
            for planned in (tuning_runs, second_round):
                pool.do(planned(options))
                for task in options.tasks:
                    choose_rates(options.results / task)
        pool.do(runs(options))
    finally:
        pool.close()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="gpu")
    parser.add_argument("--tasks", nargs="+", choices=TASKS)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--workers", type=int, default=1, help="runs side by side, spread over the GPUs")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no run is begun after so many")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--work", type=Path, default=Path("outputs/evidence"), help="where the teachers are kept")
    parser.add_argument("--timing", action="store_true", help="a few steps of each arm, one after the other, alone")
    options = parser.parse_args()
    options.workers = 1 if options.timing else options.workers
    options.results = options.results or RESULTS
    options.seeds = options.seeds or list(range(SCALES[options.scale].seeds))
    options.tasks = options.tasks or list(SCALES[options.scale].tasks)
    options.ends = time.time() + options.seconds
    return options


def tuning_runs(options: argparse.Namespace) -> list[Run]:
    steps = SCALES[options.scale].tuning_steps
    return [
        Run(task, arm, TUNING_SEED, rate, steps, options.results / task / "tuning" / f"{arm}-{rate:g}.jsonl")
        for task in options.tasks
        for arm in options.arms
        if not ARMS[arm].rate_of
        for rate in rates(arm, SCALES[options.scale])
    ]


def second_round(options: argparse.Namespace) -> list[Run]:
    """Runs of full length, on one more seed, of the arms whose two best rates the first round cannot tell apart."""
    scale = SCALES[options.scale]
    planned = []
    for task in options.tasks:
        folder = options.results / task
        for arm, first in tuned(folder).items():
            success = sorted(first["sampled"].values())
            if arm in options.arms and success[-1] - success[-2] < scale.tell_apart:
                planned += [
                    Run(task, arm, TUNING_SEED + 1, rate, scale.steps, folder / "tuning" / f"{arm}-{rate:g}-long.jsonl")
                    for rate in rates(arm, scale)
                ]
    return planned


def timing_runs(options: argparse.Namespace) -> list[Run]:
    """What a step takes on a device that does nothing else."""
    return [
        Run(
            task,
            arm,
            TUNING_SEED,
            rates(arm, SCALES[options.scale])[0],
            _TIMING_STEPS,
            options.results / task / "timing" / f"{arm}.jsonl",
        )
        for task in options.tasks
        for arm in options.arms
    ]


def rates(arm: str, scale: Scale) -> list[float]:
    """The learning rates that an arm's is chosen from."""
    return [ARMS[arm].rate_factor * rate for rate in scale.learning_rates]


def choose_rates(folder: Path) -> None:
    """Write down, for each arm, the learning rate whose policy did best, in the second round where there was one."""
    success: dict[str, dict[str, dict[str, float]]] = {}
    for path in sorted((folder / "tuning").glob("*.jsonl")):
        lines = read(path)
        (head,), (final,) = ([line for line in lines if line["kind"] == kind] for kind in ("run", "final"))
        name = "sampled" if head["seed"] == TUNING_SEED else "second_round"
        success.setdefault(head["arm"], {}).setdefault(name, {})[str(head["learning_rate"])] = final["sampled"]
    chosen = {}
    for arm, found in success.items():
        decides = found.get("second_round", found["sampled"])
        chosen[arm] = {"learning_rate": max(sorted(map(float, decides)), key=lambda rate: decides[f"{rate}"]), **found}
    (folder / "learning_rates.json").write_text(json.dumps(chosen, indent=1) + "\n")


def tuned(folder: Path) -> dict[str, Any]:
    """What `choose_rates` has written down for a task, by arm."""
    path = folder / "learning_rates.json"
    return json.loads(path.read_text()) if path.exists() else {}


def runs(options: argparse.Namespace) -> list[Run]:
    """Seed by seed, so that what has been run when a machine goes away is a comparison."""
    scale = SCALES[options.scale]
    planned = []
    for task in options.tasks:
        folder = options.results / task
        chosen = tuned(folder)
        on_task = [arm for arm in options.arms if task == scale.tasks[0] or not ARMS[arm].hard_task_only]
        for seed in options.seeds:
            for arm in (name for name in on_task if seed < ARMS[name].seeds):
                rate = chosen.get(ARMS[arm].rate_of or arm, {}).get("learning_rate", rates(arm, scale)[0])
                planned.append(Run(task, arm, seed, rate, scale.steps, folder / f"{arm}-{seed}.jsonl"))
    return planned


class _Pool:
    """Processes that share the device. Each keeps its models and what is compiled for them from run to run."""

    def __init__(self, options: argparse.Namespace):
        context = multiprocessing.get_context("spawn")
        self._jobs, self._done, self._ends = context.Queue(), context.Queue(), options.ends
        arguments = (self._jobs, self._done, options.scale, options.work)
        self._workers = [context.Process(target=work, args=arguments) for _ in range(options.workers)]
        gpus = visible_gpus()
        for i, worker in enumerate(self._workers):
            if gpus:  # one to each: a trainer that sees several would spread its batch over them
                os.environ["CUDA_VISIBLE_DEVICES"] = gpus[i % len(gpus)]
            worker.start()

    def do(self, jobs: Iterable[Run | Teacher]) -> None:
        """Return when all that have no result yet are done, or time is up."""
        pending = [job for job in jobs if not job.is_done]
        open_jobs = 0
        while open_jobs or (pending and time.time() < self._ends):
            while pending and open_jobs < len(self._workers) and time.time() < self._ends:
                self._jobs.put(pending.pop(0))
                open_jobs += 1
            try:
                print(self._done.get(timeout=5), flush=True)
                open_jobs -= 1
            except queue.Empty:
                if not all(worker.is_alive() for worker in self._workers):
                    raise SystemExit("a worker has died, see above: start again with fewer --workers") from None

    def close(self) -> None:
        for _ in self._workers:
            self._jobs.put(None)
        for worker in self._workers:
            worker.join(timeout=20)
            worker.terminate()


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def work(jobs: Any, done: Any, scale_name: str, folder: Path) -> None:
    """Do one job after the other, in a process of its own."""
    import torch

    from recipes.evidence.training import Workbench

    scale, benches = SCALES[scale_name], {}
    while (job := jobs.get()) is not None:
        started = time.perf_counter()
        try:
            if isinstance(job, Teacher):
                prepare(job, scale, folder)
            else:
                if job.task not in benches:
                    benches[job.task] = Workbench(
                        TASKS[job.task], scale, start_folder(scale, folder, job.task), folder / job.task / "teacher"
                    )
                train(job, scale, benches[job.task])
            outcome = f"after {time.perf_counter() - started:.0f} s"
        except Exception:  # one job's fault leaves the others alone
            outcome = f"failed\n{traceback.format_exc()}"
        done.put(f"{job.path} {outcome}")
        gc.collect()
        torch.cuda.empty_cache()


def prepare(job: Teacher, scale: Scale, folder: Path) -> None:
    """Train the task's teacher, and write down how policy and teacher do at the task before any arm is run.

    The policy is SmolLM2, or, where the scale says so, the teacher itself at an early stage of its training.
    """
    from recipes.evidence.models import Examiner, load_model, load_tokenizer, prompt_ids
    from recipes.evidence.sampler import PairSampler
    from recipes.evidence.small import make_untrained
    from recipes.evidence.supervised import imitate_until

    started = time.perf_counter()
    task, home = TASKS[job.task], folder / job.task
    worked = task.worked(_WORKED)
    start = start_folder(scale, folder, job.task)
    if scale.from_scratch:
        make_untrained(start, [text for pair in worked for text in pair])
    tokenizer, model = load_tokenizer(start), load_model(start)
    prompts = prompt_ids(tokenizer, [question for question, _ in worked])
    rows = [
        (prompt, [*tokenizer(solution)["input_ids"], tokenizer.eos_token_id])
        for prompt, (_, solution) in zip(prompts, worked, strict=True)
    ]
    examiner = Examiner(task, tokenizer, scale.held_out)
    sampler = PairSampler(
        model,
        None,
        rows=scale.held_out,
        prompt_width=max(map(len, [*prompts, *examiner.prompts])),
        max_tokens=task.max_tokens,
        stop_id=tokenizer.eos_token_id,
    )
    figures: dict[str, Any] = {}

    def stage(name: str) -> None:
        figures[name] = examiner.examine(sampler, seed=0, draws=_DRAWS)
        print(f"{job.task}: the {name}: {figures[name]}", flush=True)
        if name == "teacher" or scale.from_scratch:
            model.save_pretrained(home / name)

    def good_enough() -> bool:
        success = examiner.examine(sampler, seed=0)["sampled"]
        if "start" not in figures and success >= task.policy_success:
            stage("start")
        return success >= task.teacher_success

    if not scale.from_scratch:
        stage("start")
    model.train()
    figures["teacher_steps"] = imitate_until(
        model,
        rows,
        good_enough,
        check_every=scale.teacher_check,
        max_steps=scale.teacher_steps,
        batch_size=scale.teacher_batch,
        learning_rate=scale.teacher_rate,
    )
    stage("teacher")
    figures |= {"seconds": time.perf_counter() - started, **versions()}
    job.path.parent.mkdir(parents=True, exist_ok=True)
    job.path.write_text(json.dumps({"task": task.name, "options": task.options, **figures}, indent=1) + "\n")


def start_folder(scale: Scale, folder: Path, task: str) -> Path:
    """Where the untrained policy is."""
    return folder / task / "start" if scale.from_scratch else MODEL


def versions() -> dict[str, str]:
    """What the results were made with."""
    import torch
    import transformers
    import trl

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": device} | {module.__name__: module.__version__ for module in (torch, transformers, trl)}


def train(run: Run, scale: Scale, bench: Any) -> None:
    """One run from start to end; its file appears when it is whole."""
    from recipes.evidence.training import train_arm

    started = time.perf_counter()
    run.path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = run.path.with_suffix(".unfinished")
    with unfinished.open("w") as file:

        def record(kind: str, **values: Any) -> None:
            file.write(json.dumps({"kind": kind, **{name: _short(value) for name, value in values.items()}}) + "\n")
            file.flush()

        settings = asdict(replace(scale, steps=run.steps))
        record("run", task=run.task, arm=run.arm, seed=run.seed, learning_rate=run.learning_rate, **settings)
        train_arm(bench, replace(ARMS[run.arm], learning_rate=run.learning_rate), run.steps, run.seed, record)
        record("end", seconds=time.perf_counter() - started)
    unfinished.replace(run.path)


def read(path: Path) -> Sequence[dict[str, Any]]:
    """A run's lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
