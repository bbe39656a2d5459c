"""A reward function for runs in other processes: it writes down what it is given, and can hold a run in mid-step."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

COLUMNS = ("completion_ids", "alpha", "importance_weights", "logprobs_q", "logprobs_theta", "logprobs_t")


def recorded(completions: list[Any], trainer_state: Any, weight_version: list[int], **columns: Any) -> list[float]:
    """A reward that depends on the tokens; rows go to `$RECORD_DIR/<process>.jsonl`.

    At step `$HOLD_AT_STEP` (counted from 0) it writes `held-<process>` and waits for a file `go`.
    """
    folder, process = Path(os.environ["RECORD_DIR"]), os.environ.get("RANK", "0")
    questions = [prompt[-1]["content"] for prompt in columns["prompts"]]
    rows = {name: columns[name] for name in COLUMNS}
    entry = {"step": trainer_state.global_step, "weight_version": weight_version, "questions": questions, **rows}
    with (folder / f"{process}.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")
    if os.environ.get("HOLD_AT_STEP") == str(trainer_state.global_step):
        (folder / f"held-{process}").touch()
        while not (folder / "go").exists():
            time.sleep(0.05)
    return [float(sum(ids) % 7) for ids in columns["completion_ids"]]


def read_records(folder: Path, process: int) -> list[dict[str, Any]]:
    """What process `process` recorded, in order."""
    return [json.loads(line) for line in (folder / f"{process}.jsonl").read_text().splitlines()]
