"""Pairs as a custom logits processor of vLLM, `--logits-processors dual_rollout.native.processor:PairProcessor`.

vLLM has two model runners with an interface each. The class satisfies both, and what it is depends on which of them
makes it, so that nobody need know beforehand which runner vLLM will choose.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as LogitsProcessorV1
from vllm.v1.sample.logits_processor.interface import MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as LogitsProcessorV2

from dual_rollout.native.rule import PairMember
from dual_rollout.native.table import Pair, PairTable

_tables: list[PairTable] = []


class PairProcessor(LogitsProcessorV1, LogitsProcessorV2):
    """Pairs the rows of a step and forces the token drawn from q* on both; rows of other requests stay as they are."""

    def __new__(cls, vllm_config: Any, *runner: Any) -> Self:
        return object.__new__(_OnV1 if len(runner) == 2 else _OnV2)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """At admission; a `ValueError` here is vLLM's 400."""
        if PairMember.from_extra_args(sampling_params.extra_args) and sampling_params.temperature != 0.0:
            raise ValueError("a request of a pair is greedy for vLLM: its token is drawn and forced")

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        """Only the V1 runner calls it."""

    def _make_table(self, vllm_config: Any, device: torch.device) -> PairTable:
        with set_default_torch_dtype(torch.float32):  # what is compiled holds for one default dtype only
            table = PairTable(
                device,
                vllm_config.model_config.get_vocab_size(),
                vllm_config.scheduler_config.max_num_seqs,
                current_platform.simple_compile_backend,
            )
        _tables[:] = [table]
        return table


class _OnV1(PairProcessor):
    """The V1 runner tells of changes of the batch, and hands over the list of each request's tokens, which grows.

    It also shows rows of prompts that are only partly read, and drops what it samples from them. Such a row may be
    paired here; its partner then is a token ahead in the next step, or gone, and the side that is left is alone, which
    undoes the draw: both sides must have drawn a token for it to count.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        self._table = self._make_table(vllm_config, device)
        self._rows: dict[int, tuple[Pair, str, list[int]]] = {}

    def update_state(self, batch_update: Any) -> None:
        if batch_update:
            self._update_rows(batch_update)
        rows = self._rows
        positions = np.array([len(tokens) for _, _, tokens in rows.values()], dtype=np.int64)
        members = [(pair, side) for pair, side, _ in rows.values()]
        self._table.place(np.array(list(rows), dtype=np.int64), members, positions, same=not batch_update)

    def apply(self, logits: Tensor) -> Tensor:
        self._table.apply(logits)
        return logits

    def _update_rows(self, batch_update: Any) -> None:
        rows = self._rows
        for index in batch_update.removed:
            rows.pop(index, None)
        for index, params, _, tokens in batch_update.added:
            rows.pop(index, None)
            if member := PairMember.from_extra_args(params.extra_args):
                rows[index] = (self._table.open(member), member.side, tokens)
        for source, target, direction in batch_update.moved:
            moved = {target: rows.pop(source, None), source: rows.pop(target, None)}
            if direction != MoveDirectionality.SWAP:
                moved[source] = None
            rows |= {index: row for index, row in moved.items() if row is not None}


class _OnV2(PairProcessor):
    """The V2 runner numbers its requests, and says in each step which row is whose and how far it has come."""

    def __init__(self, vllm_config: Any, req_states: Any):
        self._table = self._make_table(vllm_config, req_states.device)
        self._prompt_len, self._prefill_len = req_states.prompt_len, req_states.prefill_len
        self._members: dict[int, tuple[Pair, str]] = {}
        self._requests = np.empty(0, dtype=np.int64)
        self._indices: list[int] = []

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        self._requests = np.empty(0, dtype=np.int64)  # the number may have been another request's in the step before
        self._members.pop(req_idx, None)
        if member := PairMember.from_extra_args(sampling_params.extra_args):
            self._members[req_idx] = (self._table.open(member), member.side)
        return req_idx in self._members

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        requests, lengths = ctx.idx_mapping_np, ctx.seq_lens_upper_bound_np[: len(ctx.idx_mapping_np)]
        drawing = lengths >= self._prefill_len.np[requests]  # else its prompt is only partly read
        indices = [row for row, request in enumerate(requests.tolist()) if request in self._members and drawing[row]]
        own = requests[indices]
        same = np.array_equal(own, self._requests) and np.array_equal(indices, self._indices)
        self._requests, self._indices = own.copy(), indices
        members = [self._members[request] for request in own.tolist()]
        positions = lengths[indices].astype(np.int64) - self._prompt_len.np[own]
        self._table.place(np.array(indices, dtype=np.int64), members, positions, same)
        self._table.apply(logits)
        return logits


class PairWorker:
    """What the API server asks of the workers, `--worker-extension-cls dual_rollout.native.processor.PairWorker`."""

    def dual_rollout_take(self, names: Iterable[str]) -> dict[str, bytes]:
        """`PairTable.take` of this worker's engine."""
        return _tables[0].take(names)
