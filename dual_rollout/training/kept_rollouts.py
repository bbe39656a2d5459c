"""A few rollouts of each step, kept in the run's folder for `dual-rollout report`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import TrainerCallback

from dual_rollout.prompts import as_text
from dual_rollout.record import COUNTS, FLOAT_COLUMNS, KEPT_DIAGNOSTICS, output_name

FOLDER = "rollouts"

PER_TOKEN = {output_name(name): name for name in FLOAT_COLUMNS} | {name: name for name in KEPT_DIAGNOSTICS}
"""The numbers of each token, by their names in the files: those of shards, and a few diagnostics. NaN at tokens that
were not drawn, as those of tools' results."""

KEPT_OF_A_ROW = PER_TOKEN | {name: name for name in COUNTS}
"""The columns of a trainer's rollout that are kept, by their names in the files; those that it lacks are null."""

SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("prompt", pa.string()),
        ("t_prompt", pa.string()),
        ("t_target", pa.string()),
        ("reward", pa.float64()),
        ("advantage", pa.float64()),
        ("generated_tokens", pa.list_(pa.int32())),
        *((name, pa.list_(pa.float32())) for name in PER_TOKEN),
        *((name, pa.int32()) for name in COUNTS),
    ]
)


class KeptRollouts(TrainerCallback):
    """Writes `rollouts/rollouts_<step>.parquet` in the output folder, one file per training step, by the main process.

    A resumed run goes on after the step that it begins from; other runs begin anew.

    Args:
        limit: rollouts of a step at most, the first rows, so that groups stay together; 0 for none.

    Raises:
        ValueError: a limit that is not a whole number, or below 0.
    """

    def __init__(self, limit: int):
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 0:
            raise ValueError(f"kept_rollouts must be a whole number of at least 0, got {limit!r}")
        self.limit = limit
        self._folder: Path | None = None  # in training alone
        self._written: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self._folder, self._written = Path(args.output_dir) / FOLDER, None
        for path in self._folder.glob("rollouts_*.parquet"):
            if int(path.stem.removeprefix("rollouts_")) > state.global_step:
                path.unlink()

    def wants(self, step: int) -> bool:
        """Whether rows of this step are still to be kept."""
        return self.limit > 0 and self._folder is not None and step != self._written

    def keep(self, step: int, rows: Sequence[Mapping[str, Any]], tokenizer: str) -> None:
        """Write the first rows of a step.

        Args:
            step: the number under which the trainer will log it.
            rows: with the columns of `SCHEMA`, but for the step; prompts as the dataset has them.
            tokenizer: name or folder of what tells the tokens' texts.
        """
        assert self._folder is not None
        self._written = step
        self._folder.mkdir(parents=True, exist_ok=True)
        kept = [
            {**row, "step": step, "prompt": as_text(row["prompt"]), "t_prompt": as_text(row["t_prompt"])}
            for row in rows[: self.limit]
        ]
        table = pa.Table.from_pylist(kept, SCHEMA.with_metadata({"tokenizer": tokenizer}))
        path = self._folder / f"rollouts_{step:05d}.parquet"
        temporary = path.with_suffix(".tmp")  # whole or not at all, for this run may be killed
        pq.write_table(table, temporary, compression="zstd", use_dictionary=["prompt", "t_prompt"])
        temporary.replace(path)
