"""`RolloutBatch`: rollouts as tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch

from dual_rollout.record import FLOAT_COLUMNS
from dual_rollout.types import GenerationOutput


@dataclass(slots=True)
class RolloutBatch:
    """Sequences from q* as tensors: prompts padded on the left, completions on the right.

    Attributes:
        prompt_ids, prompt_mask: `(B, P)` long; mask 1 at real tokens.
        completion_ids, completion_mask: `(B, T)` long.
        weight_version: `(B,)` long, the version of π_θ's weights each row was sampled under; -1 where none is known.
        columns: the numbers of the record, `(B, T)` float32 each, 0 at padding; they are attributes too. `alpha`;
            `importance_weights`, π_θ(y)/q*(y), untruncated; `logprobs_q`, `logprobs_theta`, `logprobs_t` in nats, log
            π_t NaN at tokens without a target.
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    completion_ids: torch.Tensor
    completion_mask: torch.Tensor
    weight_version: torch.Tensor
    columns: dict[str, torch.Tensor]

    @classmethod
    def from_outputs(cls, outputs: Sequence[GenerationOutput], pad_token_id: int) -> RolloutBatch:
        """Pad and stack outputs that all succeeded."""
        prompts = [output.prompt_token_ids for output in outputs]
        completions = [output.record.token_ids for output in outputs]
        versions = [output.record.weight_version for output in outputs]
        return cls(
            prompt_ids=pad_rows(prompts, pad_token_id, left=True),
            prompt_mask=pad_rows([[1] * len(row) for row in prompts], 0, left=True),
            completion_ids=pad_rows(completions, pad_token_id),
            completion_mask=pad_rows([[1] * len(row) for row in completions], 0),
            weight_version=torch.tensor([-1 if version is None else version for version in versions]),
            columns={
                name: pad_rows([getattr(output.record, name) for output in outputs], 0.0) for name in FLOAT_COLUMNS
            },
        )

    def __getattr__(self, name: str) -> torch.Tensor:
        if name in FLOAT_COLUMNS:
            return self.columns[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getitem__(self, rows: torch.Tensor | slice) -> RolloutBatch:
        """Some of the rows, `rows` as in the indexing of a tensor, as wide as before."""
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> RolloutBatch:
        """The same batch with all tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> RolloutBatch:
        tensors = {spec.name: change(getattr(self, spec.name)) for spec in fields(self) if spec.name != "columns"}
        return RolloutBatch(**tensors, columns={name: change(column) for name, column in self.columns.items()})


def pad_rows(
    rows: Sequence[Sequence[float]], value: float, *, left: bool = False, width: int | None = None
) -> torch.Tensor:
    """Rows of unlike length as one `(B, T)` tensor: long for ints, float32 for floats."""
    dtype = torch.float32 if isinstance(value, float) else torch.long
    width = max(map(len, rows)) if width is None else width
    padded = torch.full((len(rows), width), value, dtype=dtype)
    for i, row in enumerate(rows):
        if row:
            columns = slice(width - len(row), width) if left else slice(0, len(row))
            padded[i, columns] = torch.tensor(row, dtype=dtype)
    return padded
