"""Rollouts from q* as a custom logits processor of vLLM, `--logits-processors dual_rollout.native.processor:Processor`.

vLLM has two model runners with an interface each. The class satisfies both, and what it is depends on which of them
makes it, so that nobody need know beforehand which runner vLLM will choose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as LogitsProcessorV1
from vllm.v1.sample.logits_processor.interface import MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as LogitsProcessorV2

from dual_rollout.config import AlphaRule
from dual_rollout.native.ordinary_requests import OrdinaryRows
from dual_rollout.native.table import DrawnRollout, RowTable
from dual_rollout.native.wire import Member, Side

_tables: list[RowTable] = []


class Processor(LogitsProcessorV1, LogitsProcessorV2):
    """Draws the tokens of rollouts and forces them on their rows; rows of other requests stay as they are, unless the
    server was told to draw these from q* too."""

    _table: RowTable
    _ordinary: OrdinaryRows | None
    _target_logits: Callable[[], Tensor] | None

    def __new__(cls, vllm_config: Any, *runner: Any) -> Self:
        return object.__new__(_OnV1 if len(runner) == 2 else _OnV2)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """At admission; a `ValueError` here is vLLM's 400."""
        if Member.from_extra_args(sampling_params.extra_args) and sampling_params.temperature != 0.0:
            raise ValueError("a request of a rollout is greedy for vLLM: its token is drawn and forced")

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        """Only the V1 runner calls it."""

    def _set_up(self, vllm_config: Any, device: torch.device) -> None:
        model, backend = vllm_config.model_config, current_platform.simple_compile_backend
        two_models = getattr(model.hf_config, "dual_rollout", None)
        vocab_size, vocab_size_t = model.get_vocab_size(), None
        if vllm_config.lora_config is not None and current_platform.is_cpu():
            from dual_rollout.native.cpu_adapters import skip_rows_without_adapter

            skip_rows_without_adapter()
        self._target_logits = self._ordinary = None
        if two_models is not None:
            from dual_rollout.native.model import target_logits

            self._target_logits, vocab_size_t = target_logits, two_models["vocab_size_t"]
        with set_default_torch_dtype(torch.float32):  # what is compiled holds for one default dtype only
            max_rows = vllm_config.scheduler_config.max_num_seqs
            self._table = RowTable(device, vocab_size, max_rows, backend, self._target_logits, vocab_size_t)
            if two_models is not None and two_models["ordinary_requests"] is not None:
                self._ordinary = OrdinaryRows(AlphaRule(**two_models["ordinary_requests"]), device, backend)
                self._ordinary.warm_up(vocab_size, two_models["vocab_size_t"])
        _tables[:] = [self._table]

    def _apply(self, logits: Tensor, temperatures: dict[int, float]) -> Tensor:
        """Draw what `self._table` was told of, and turn the rows of ordinary requests."""
        self._table.apply(logits)
        if self._ordinary is not None and temperatures:
            assert self._target_logits is not None
            self._ordinary.apply(logits, self._target_logits(), temperatures)
        return logits


class _OnV1(Processor):
    """The V1 runner tells of changes of the batch, and hands over the list of each request's tokens, which grows.

    It also shows rows of prompts that are only partly read, and drops what it samples from them. Such a row may be
    paired here; its partner then is a token ahead in the next step, or gone, and the side that is left is alone, which
    undoes the draw: both sides must have drawn a token for it to count.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        self._set_up(vllm_config, device)
        self._rows: dict[int, tuple[DrawnRollout, Side, list[int]]] = {}
        self._temperatures: dict[int, float] = {}

    def update_state(self, batch_update: Any) -> None:
        if batch_update:
            self._update_rows(batch_update)
        rows = self._rows
        positions = np.array([len(tokens) for _, _, tokens in rows.values()], dtype=np.int64)
        members = [(rollout, side) for rollout, side, _ in rows.values()]
        self._table.place(np.array(list(rows), dtype=np.int64), members, positions, same=not batch_update)

    def apply(self, logits: Tensor) -> Tensor:
        return self._apply(logits, self._temperatures)

    def _update_rows(self, batch_update: Any) -> None:
        both: tuple[dict[int, Any], ...] = (self._rows, self._temperatures)
        for index in batch_update.removed:
            for rows in both:
                rows.pop(index, None)
        for index, params, _, tokens in batch_update.added:
            for rows in both:
                rows.pop(index, None)
            if member := Member.from_extra_args(params.extra_args):
                self._rows[index] = (self._table.open(member), member.side, tokens)
            elif self._ordinary is not None:
                self._temperatures[index] = params.temperature
        for source, target, direction in batch_update.moved:
            for rows in both:
                moved = {target: rows.pop(source, None), source: rows.pop(target, None)}
                if direction != MoveDirectionality.SWAP:
                    moved[source] = None
                rows.update({index: row for index, row in moved.items() if row is not None})


class _OnV2(Processor):
    """The V2 runner numbers its requests, and says in each step which row is whose and how far it has come."""

    def __init__(self, vllm_config: Any, req_states: Any):
        self._set_up(vllm_config, req_states.device)
        self._prompt_len, self._prefill_len = req_states.prompt_len, req_states.prefill_len
        self._members: dict[int, tuple[DrawnRollout, Side]] = {}
        self._temperatures: dict[int, float] = {}
        self._requests = np.empty(0, dtype=np.int64)
        self._indices: list[int] = []

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        self._requests = np.empty(0, dtype=np.int64)  # the number may have been another request's in the step before
        self._members.pop(req_idx, None)
        self._temperatures.pop(req_idx, None)
        if member := Member.from_extra_args(sampling_params.extra_args):
            self._members[req_idx] = (self._table.open(member), member.side)
        elif self._ordinary is not None:
            self._temperatures[req_idx] = sampling_params.temperature
        return req_idx in self._members or req_idx in self._temperatures

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
        rows = enumerate(requests.tolist())
        return self._apply(logits, {row: self._temperatures[r] for row, r in rows if r in self._temperatures})


class WorkerExtension:
    """What the API server asks of the workers, `--worker-extension-cls`."""

    def dual_rollout_take(self, names: Iterable[str]) -> dict[str, bytes]:
        """`RowTable.take` of this worker's engine."""
        return _tables[0].take(names)
