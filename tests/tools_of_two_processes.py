"""One process of a run with tools: `accelerate launch -m tests.tools_of_two_processes THETA T THETA_URL T_URL FOLDER`.

Every number of its own rows is checked, and how many turns each had is written down for the test.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.integration.conftest import TinyPair
from tests.integration.test_tools import add, check, divide, lengths, run


def main(theta_model: str, t_model: str, theta_url: str, t_url: str, folder: str) -> None:
    pair = TinyPair(Path(theta_model), Path(t_model), theta_url, t_url)
    trainer = run(pair, Path(folder), copies=2, tools=[add, divide], reward_funcs=lengths)
    turns = check(trainer, pair, lambda row: row["t_prompt"], [add, divide])
    rows = [row["number"] for inputs, *_ in trainer.seen for row in inputs]
    found = {"turns": [len(row) for row in turns], "rows": rows}
    (Path(folder) / f"found-{trainer.accelerator.process_index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
