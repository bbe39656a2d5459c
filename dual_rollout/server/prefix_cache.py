"""Key/value rows kept per token sequence and reused by longest common prefix."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch

MIN_CAPACITY = 64


@dataclass(frozen=True)
class KVShape:
    """Shape of the key/value rows of one token: ``(layers, 2, kv_heads, head_dim)``."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def allocate(self, capacity: int) -> torch.Tensor:
        """An uninitialised buffer ``(layers, 2, kv_heads, capacity, head_dim)``."""
        shape = (self.num_layers, 2, self.num_kv_heads, capacity, self.head_dim)
        return torch.empty(shape, dtype=self.dtype)


class KVSequence:
    """Append-only key/value rows of one token sequence; the first ``length`` rows are valid.

    ``users`` counts the requests that read or extend it. Rows never change once written, so any number of
    requests may read the valid ones while one appends.
    """

    def __init__(self, slot: int, adapter: str | None, tokens: np.ndarray, buffer: torch.Tensor) -> None:
        self.slot = slot
        self.adapter = adapter
        self.tokens = tokens
        self.buffer = buffer
        self.length = 0
        self.users = 1

    @property
    def capacity(self) -> int:
        return self.buffer.shape[3]

    def key(self) -> tuple[str | None, bytes]:
        return self.adapter, self.tokens[: self.length].tobytes()


class PrefixCache:
    """All key/value rows of the server, evicted least recently used first to stay within a byte budget.

    Sequences in use are never evicted, so the budget is a promise only if the scheduler admits no more than
    ``fits`` allows.
    """

    def __init__(self, shape: KVShape, budget_bytes: int, max_model_len: int, max_sequences: int) -> None:
        self.shape = shape
        self.budget_bytes = budget_bytes
        self.max_model_len = max_model_len
        # zeros is lazy: untouched rows of a long context cost address space, not memory.
        self.tokens = np.zeros((max_sequences, max_model_len), dtype=np.int32)
        self._sequences: list[KVSequence | None] = [None] * max_sequences
        self._free_slots = list(range(max_sequences - 1, -1, -1))
        self._num_slots_seen = 0
        self._idle: OrderedDict[int, KVSequence] = OrderedDict()
        self._idle_by_key: dict[tuple[str | None, bytes], KVSequence] = {}
        self._bytes = 0

    def bytes_for(self, num_tokens: int) -> int:
        """Bytes that a sequence grown to ``num_tokens`` will hold."""
        return self._capacity_for(num_tokens) * self.shape.bytes_per_token

    def acquire(self, token_ids: np.ndarray, adapter: str | None) -> tuple[KVSequence, int]:
        """Rows to compute ``token_ids`` (int32, ``(T,)``) on: ``(sequence, number of its rows that match)``.

        The sequence holds all the tokens (and maybe more), or is a stored one that the tokens extend, or is a
        new one that starts with a copy of the shared rows. It may have other users: append to it only while
        its length is the number of rows that match, else ``fork`` it. Call ``release`` when done.
        """
        source, shared = self._match(token_ids, adapter)
        if source is None:
            return self.new(adapter, len(token_ids)), 0
        if shared in (len(token_ids), source.length):
            self._claim(source)
            return source, shared
        self._claim(source)
        copy = self.fork(source, shared, capacity=len(token_ids))
        self.release(source)
        return copy, shared

    def new(self, adapter: str | None, num_tokens: int) -> KVSequence:
        """An empty sequence with room for ``num_tokens``."""
        capacity = self._capacity_for(num_tokens)
        self._make_room(capacity * self.shape.bytes_per_token)
        if not self._free_slots:
            self._drop(next(iter(self._idle.values())))
        slot = self._free_slots.pop()
        self._num_slots_seen = max(self._num_slots_seen, slot + 1)
        sequence = KVSequence(slot, adapter, self.tokens[slot], self.shape.allocate(capacity))
        self._sequences[slot] = sequence
        self._bytes += capacity * self.shape.bytes_per_token
        return sequence

    def fork(self, source: KVSequence, length: int, *, capacity: int) -> KVSequence:
        """A new sequence with a copy of the first ``length`` rows of ``source``, which must be in use."""
        copy = self.new(source.adapter, max(length, capacity))
        copy.buffer[:, :, :, :length] = source.buffer[:, :, :, :length]
        copy.tokens[:length] = source.tokens[:length]
        copy.length = length
        return copy

    def share(self, sequence: KVSequence) -> KVSequence:
        """One more user of a sequence that is in use."""
        self._claim(sequence)
        return sequence

    def grow(self, sequence: KVSequence, num_tokens: int) -> None:
        """Make room for ``num_tokens`` rows; capacities grow geometrically, so appending is amortised."""
        if num_tokens <= sequence.capacity:
            return
        capacity = self._capacity_for(num_tokens)
        self._make_room((capacity - sequence.capacity) * self.shape.bytes_per_token)
        larger = self.shape.allocate(capacity)
        larger[:, :, :, : sequence.length] = sequence.buffer[:, :, :, : sequence.length]
        self._bytes += (capacity - sequence.capacity) * self.shape.bytes_per_token
        sequence.buffer = larger

    def commit(self, sequence: KVSequence, start: int, token_ids: list[int]) -> None:
        """Declare the rows of ``token_ids`` at position ``start`` computed."""
        end = start + len(token_ids)
        if end > sequence.length:
            sequence.tokens[start:end] = token_ids
            sequence.length = end

    def release(self, sequence: KVSequence) -> None:
        """Give back one use; an unused sequence stays for later prompts until it is evicted."""
        sequence.users -= 1
        if sequence.users > 0 or self._sequences[sequence.slot] is not sequence:
            return
        if sequence.length == 0:
            self._drop(sequence)
            return
        twin = self._idle_by_key.get(sequence.key())
        if twin is not None:
            self._drop(twin)
        self._idle[sequence.slot] = sequence
        self._idle_by_key[sequence.key()] = sequence

    def clear(self, adapter: str | None = None, *, every_adapter: bool = True) -> bool:
        """Forget unused sequences; True when none is left in use."""
        for sequence in list(self._idle.values()):
            if every_adapter or sequence.adapter == adapter:
                self._drop(sequence)
        return all(sequence is None for sequence in self._sequences)

    def _match(self, token_ids: np.ndarray, adapter: str | None) -> tuple[KVSequence | None, int]:
        """The sequence with the longest prefix of ``token_ids``, if possible one to extend in place."""
        one_less = self._idle_by_key.get((adapter, token_ids[:-1].tobytes()))
        if one_less is not None:
            return one_less, one_less.length
        count = self._num_slots_seen
        same = self.tokens[:count, : len(token_ids)] == token_ids
        shared = np.where(same.all(axis=1), len(token_ids), same.argmin(axis=1))
        best: tuple[int, bool, int] = (0, False, -1)
        for slot in np.argsort(-shared, kind="stable").tolist():
            if shared[slot] < best[0] or shared[slot] == 0:
                break
            sequence = self._sequences[slot]
            if sequence is None or sequence.adapter != adapter:
                continue
            length = min(int(shared[slot]), sequence.length)
            in_place = sequence.users == 0 and sequence.length == length
            best = max(best, (length, in_place, slot))
        return (self._sequences[best[2]], best[0]) if best[0] else (None, 0)

    def _claim(self, sequence: KVSequence) -> None:
        if sequence.users == 0:
            del self._idle[sequence.slot]
            del self._idle_by_key[sequence.key()]
        sequence.users += 1

    def _make_room(self, num_bytes: int) -> None:
        while self._idle and self._bytes + num_bytes > self.budget_bytes:
            self._drop(next(iter(self._idle.values())))

    def _drop(self, sequence: KVSequence) -> None:
        if self._idle.pop(sequence.slot, None) is not None:
            del self._idle_by_key[sequence.key()]
        self._sequences[sequence.slot] = None
        self._free_slots.append(sequence.slot)
        self._bytes -= sequence.capacity * self.shape.bytes_per_token

    def _capacity_for(self, num_tokens: int) -> int:
        capacity = MIN_CAPACITY
        while capacity < num_tokens:
            capacity += max(MIN_CAPACITY, capacity // 2)
        return min(capacity, self.max_model_len)
