"""How long `dual-rollout report` takes for 2,000 rollouts of 512 tokens, and a browser to open the page.

    python -m tests.bench_report

On random tokens and numbers, which compress and repeat less than those of a run.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from dual_rollout.report.page import write_report
from dual_rollout.training.kept_rollouts import PER_TOKEN, KeptRollouts
from tests.browser import browser
from tests.tiny_model import make_tokenizer

ROLLOUTS, TOKENS, PER_STEP = 2000, 512, 8


class Run:
    """What the callback reads of a trainer."""

    is_world_process_zero, global_step = True, 0

    def __init__(self, folder: Path):
        self.output_dir = str(folder)


def write_run(folder: Path) -> float:
    """Kept rollouts of many steps; returns the median CPU seconds of a write."""
    rng, kept, run = np.random.default_rng(0), KeptRollouts(PER_STEP), Run(folder)
    make_tokenizer().save_pretrained(folder)
    kept.on_train_begin(run, run, None)
    seconds = []  # of CPU
    for step in range(1, ROLLOUTS // PER_STEP + 1):
        rows = []
        for _ in range(PER_STEP):
            numbers = {name: (-rng.random(TOKENS)).tolist() for name in PER_TOKEN}
            about = {"prompt": f"question {step}", "t_prompt": None, "t_target": None, "reward": 0.5, "advantage": 0.1}
            rows.append(about | numbers | {"generated_tokens": rng.integers(0, 256, TOKENS).tolist()})
        started = time.process_time()
        kept.keep(step, rows, str(folder))
        seconds.append(time.process_time() - started)
    return float(np.median(seconds))


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(
            f"a step's {PER_STEP} rollouts of {TOKENS} tokens are written in {1000 * write_run(folder):.1f} ms of CPU"
        )
        started = time.process_time()
        write_report([folder], folder / "report.html")
        size = (folder / "report.html").stat().st_size / 1e6
        print(f"{ROLLOUTS} of them become a page of {size:.0f} MB in {time.process_time() - started:.1f} s of CPU")
        with browser() as chromium:
            page = chromium.new_page()
            started, used = time.perf_counter(), cpu_seconds()
            page.goto((folder / "report.html").as_uri())
            page.wait_for_selector("#rollout span[data-i]")
            seconds, used = time.perf_counter() - started, cpu_seconds() - used
            print(
                f"which a browser has open, with the first rollout drawn, after {seconds:.2f} s ({used:.2f} s of CPU)"
            )


def cpu_seconds() -> float:
    """Of this process's children, the browser's among them: it does not grow while they wait for a busy machine."""
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return float(sum(each.user + each.system for each in times))


if __name__ == "__main__":
    main()
