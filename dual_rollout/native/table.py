"""Which rows of a step are drawn together, and what was drawn for them: the host's side of `draw`.

Index tensors live on the device and are sent anew only when the batch changes; from step to step they are advanced
there. Numbers stay on the device too, in pages, and are fetched once, when a rollout ends.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dual_rollout.config import AlphaRule
from dual_rollout.native.alpha_methods import SOLVERS, alpha_of_rule
from dual_rollout.native.draw import FORCED, DrawInPlace, compiled_draw, pack, set_alpha, unpack
from dual_rollout.native.wire import NUMBERS, Member, Side

logger = logging.getLogger(__name__)

PAGE = 128
_PADDING = 64


@dataclass(eq=False)
class DrawnRollout:
    """A rollout of the batch. The numbers of its position i are in page `pages[i // PAGE]` of the table."""

    member: Member
    pages: list[int] = field(default_factory=list)
    length: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the logits that is a side of a rollout, or both; `position` counts the tokens its request has drawn."""

    index: int
    rollout: DrawnRollout
    side: Side
    position: int


@dataclass(frozen=True, slots=True)
class _Columns:
    """Rollouts that are drawn in one call: `draw.PACKED`, and the columns whose α is not solved in the draw itself."""

    packed: Tensor
    elsewhere: list[tuple[AlphaRule, float, Tensor]]


class RowTable:
    """All rollouts of an engine.

    Args:
        vocab_size: columns of the logits.
        max_rows: of a step; the table begins with two pages for each and grows.
        backend: of `torch.compile`, where there is no GPU.
        target_logits: gives the logits of π_t for the rows of the step, `(B, V_t)`; None where one model is both, and
            the other side's row has them.
        vocab_size_t: V_t, with `target_logits`.
    """

    def __init__(
        self,
        device: torch.device,
        vocab_size: int,
        max_rows: int,
        backend: str = "inductor",
        target_logits: Callable[[], Tensor] | None = None,
        vocab_size_t: int | None = None,
    ):
        self._device = device
        self._target_logits = target_logits
        self._rollouts: dict[str, DrawnRollout] = {}
        self._free = list(range(2 * max_rows))
        self._numbers = torch.full((len(self._free) * PAGE, len(NUMBERS)), torch.nan, device=device)
        self._draw = _draw_of(device, backend)
        self._expected: np.ndarray | None = None
        self._drawn: list[DrawnRollout] = []
        self._columns: dict[bool, _Columns] = {}
        self._apart: list[Row] = []
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._warm_up(vocab_size, vocab_size_t)

    def open(self, member: Member) -> DrawnRollout:
        """The rollout of a request that enters the batch; its partner's, where it has one."""
        return self._rollouts.setdefault(member.rollout, DrawnRollout(member))

    def take(self, names: Iterable[str]) -> dict[str, bytes]:
        """The numbers of rollouts that have ended, float32 `(length, 7)` in C order, NaN where a row was alone; their
        pages are free again. Unknown names are left out.

        All work whose tokens a client has seen is done, so the copy need not wait for the step under way.
        """
        taken = {}
        stream = torch.cuda.stream(self._copies) if self._copies else contextlib.nullcontext()
        for name in names:
            if (rollout := self._rollouts.pop(name, None)) is None:
                continue
            with stream:
                cells = np.array(rollout.pages, dtype=np.int64)[:, None] * PAGE + np.arange(PAGE)
                numbers = self._numbers[torch.from_numpy(cells.flatten()[: rollout.length]).to(self._device)].cpu()
            taken[name] = numbers.numpy().tobytes()
            self._free += rollout.pages
            self._expected = None
        return taken

    def place(
        self, indices: np.ndarray, members: Sequence[tuple[DrawnRollout, Side]], positions: np.ndarray, same: bool
    ) -> None:
        """Say what the rows of the step are, before `apply`.

        Args:
            indices: `(m,)` rows of the logits that belong to rollouts.
            members: rollout and side of each.
            positions: `(m,)` tokens that each row's request has drawn.
            same: `indices` and `members` are those of the step before.
        """
        moved_on = same and self._expected is not None and not self._apart and (positions == self._expected).all()
        if moved_on and (positions % PAGE).all():  # what `apply` left on the device is right
            for rollout in self._drawn:
                rollout.length += 1
        else:
            rows = zip(indices.tolist(), members, positions.tolist(), strict=True)
            self._rebuild([Row(index, *member, position) for index, member, position in rows])
        self._expected = positions + 1

    def apply(self, logits: Tensor) -> None:
        """Draw a token for each rollout and force it on its rows; rows that lack their partner get their mark.

        Args:
            logits: `(B, V)` float32 of π_θ, changed in place so that the forced token is the greatest.
        """
        for alone, columns in self._columns.items():
            logits_t = logits if alone or self._target_logits is None else self._target_logits()
            for rule, temperature, chosen in columns.elsewhere:
                pairs = unpack(columns.packed)
                rows = logits[pairs.rows_theta[chosen]], logits_t[pairs.rows_t[chosen]]
                set_alpha(columns.packed, chosen, alpha_of_rule(rule, temperature, *rows))
            self._draw(logits, logits_t, columns.packed, self._numbers)
        if self._apart:
            rows, marks, cells = self._alone
            logits[rows, marks] = FORCED
            self._numbers[cells] = torch.nan

    def _rebuild(self, rows: list[Row]) -> None:
        sides: dict[DrawnRollout, dict[str, Row]] = {}
        for row in rows:
            known = self._rollouts.get(row.rollout.member.rollout)
            if known is row.rollout:  # else it was taken, and what its request still draws is dropped
                sides.setdefault(row.rollout, {})[row.side] = row
        complete: dict[bool, list[tuple[Row, Row]]] = {}
        self._apart = []
        for found in sides.values():
            single = found.get("both", found.get("alone"))
            theta, t = (single, single) if single else (found.get("theta"), found.get("t"))
            if theta is not None and t is not None and theta.position == t.position:
                complete.setdefault("alone" in found, []).append((theta, t))
            else:
                self._apart += found.values()
        self._drawn = [theta.rollout for pairs in complete.values() for theta, _ in pairs]
        self._columns = {alone: self._columns_of(pairs) for alone, pairs in complete.items()}
        if self._apart:
            marks = [row.rollout.member.mark for row in self._apart]
            cells = [self._cell(row) for row in self._apart]
            self._alone = self._send(np.array([[row.index for row in self._apart], marks, cells]))

    def _columns_of(self, pairs: list[tuple[Row, Row]]) -> _Columns:
        members = [theta.rollout.member for theta, _ in pairs]
        packed = pack(
            rows=[(theta.index, t.index) for theta, t in pairs],
            members=members,
            positions=[member.start + theta.position for member, (theta, _) in zip(members, pairs, strict=True)],
            cells=[self._cell(theta) for theta, _ in pairs],
        )
        choices = [(member.rule, member.temperature) for member in members]
        elsewhere = [
            (*choice, self._send(np.flatnonzero([other == choice for other in choices])))
            for choice in set(choices)
            if choice[0].alpha_method in SOLVERS
        ]
        return _Columns(self._send(packed), elsewhere)

    def _cell(self, row: Row) -> int:
        rollout = row.rollout
        rollout.length = max(rollout.length, row.position + 1)
        while len(rollout.pages) * PAGE < rollout.length:
            if not self._free:
                self._grow()
            rollout.pages.append(self._free.pop())
        return rollout.pages[row.position // PAGE] * PAGE + row.position % PAGE

    def _grow(self) -> None:
        pages = len(self._numbers) // PAGE
        self._free += range(pages, 2 * pages)
        self._numbers = torch.cat((self._numbers, torch.full_like(self._numbers, torch.nan)))
        logger.info("room for the numbers of %d positions", len(self._numbers))

    def _send(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)

    @torch.inference_mode()
    def _warm_up(self, vocab_size: int, vocab_size_t: int | None) -> None:
        """Compile `draw` now, and not during the first requests."""
        target_logits = self._target_logits
        # vLLM pads the vocabulary, and in some cases hands over a slice of that.
        for padded in (False, True):
            if vocab_size_t is not None:
                self._target_logits = lambda: _zeros(vocab_size_t, padded, self._device)  # noqa: B023
            for side in ("both", "alone") if vocab_size_t is not None else ("both",):
                name = f"warm-up {side}"
                rollout = self.open(
                    Member(rollout=name, side=side, seed=0, start=0, mark=0, rule=AlphaRule(), temperature=1.0)
                )
                self.place(np.arange(1), [(rollout, side)], np.zeros(1, dtype=np.int64), same=False)
                self.apply(_zeros(vocab_size, padded, self._device))
                self.take([name])
        self._target_logits = target_logits


def _zeros(vocab_size: int, padded: bool, device: torch.device) -> Tensor:
    columns = -(-vocab_size // _PADDING) * _PADDING if padded else vocab_size
    return torch.zeros(3, columns, device=device)[:, :vocab_size]


def _draw_of(device: torch.device, backend: str) -> DrawInPlace:
    if device.type != "cuda":
        return compiled_draw(backend)
    from dual_rollout.native.kernel import draw_in_place

    return draw_in_place
