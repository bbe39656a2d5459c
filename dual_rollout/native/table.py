"""Which rows of a step are pairs, and what was drawn for them: the host's side of `draw`.

Index tensors live on the device and are sent anew only when the batch changes; from step to step they are advanced
there. Numbers stay on the device too, in pages, and are fetched once, when a rollout ends.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dual_rollout.native.alpha import alpha_of_method
from dual_rollout.native.draw import FORCED, DrawInPlace, compiled_draw, pack, set_alpha, unpack
from dual_rollout.native.rule import NUMBERS, PairMember, PairRule

logger = logging.getLogger(__name__)

PAGE = 128
_PADDING = 64
_SOLVED_IN_DRAW = ("kl_symmetry", "fixed")


@dataclass(eq=False)
class Pair:
    """A rollout's pages of numbers: those of position i are in `pages[i // PAGE]`."""

    member: PairMember
    pages: list[int] = field(default_factory=list)
    length: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the logits that is one side of a pair; `position` counts the tokens that its request has drawn."""

    index: int
    pair: Pair
    side: str
    position: int


class PairTable:
    """All pairs of an engine.

    Args:
        vocab_size: columns of the logits.
        max_rows: of a step; the table begins with two pages for each and grows.
        backend: of `torch.compile`, where there is no GPU.
    """

    def __init__(self, device: torch.device, vocab_size: int, max_rows: int, backend: str = "inductor"):
        self._device = device
        self._pairs: dict[str, Pair] = {}
        self._free = list(range(2 * max_rows))
        self._record = torch.full((len(self._free) * PAGE, len(NUMBERS)), torch.nan, device=device)
        self._draw = _draw_of(device, backend)
        self._expected: np.ndarray | None = None
        self._together: list[Pair] = []
        self._apart: list[Row] = []
        self._elsewhere: list[tuple[PairRule, Tensor]] = []
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._warm_up(vocab_size)

    def open(self, member: PairMember) -> Pair:
        """The pair of a request that enters the batch."""
        return self._pairs.setdefault(member.pair, Pair(member))

    def take(self, names: Iterable[str]) -> dict[str, bytes]:
        """The numbers of pairs that have ended, float32 `(length, 7)` in C order, NaN where a row was alone; their
        pages are free again. Unknown names are left out.

        All work whose tokens a client has seen is done, so the copy need not wait for the step under way.
        """
        taken = {}
        stream = torch.cuda.stream(self._copies) if self._copies else contextlib.nullcontext()
        for name in names:
            if (pair := self._pairs.pop(name, None)) is None:
                continue
            with stream:
                cells = (np.array(pair.pages, dtype=np.int64)[:, None] * PAGE + np.arange(PAGE)).flatten()[
                    : pair.length
                ]
                numbers = self._record[torch.from_numpy(cells).to(self._device)].cpu()
            taken[name] = numbers.numpy().tobytes()
            self._free += pair.pages
            self._expected = None
        return taken

    def place(
        self, indices: np.ndarray, members: Sequence[tuple[Pair, str]], positions: np.ndarray, same: bool
    ) -> None:
        """Say what the rows of the step are, before `apply`.

        Args:
            indices: `(m,)` rows of the logits that belong to pairs.
            members: pair and side of each.
            positions: `(m,)` tokens that each row's request has drawn.
            same: `indices` and `members` are those of the step before.
        """
        moved_on = same and self._expected is not None and not self._apart and (positions == self._expected).all()
        if moved_on and (positions % PAGE).all():  # what `apply` left on the device is right
            for pair in self._together:
                pair.length += 1
        else:
            rows = zip(indices.tolist(), members, positions.tolist(), strict=True)
            self._rebuild([Row(index, *member, position) for index, member, position in rows])
        self._expected = positions + 1

    def apply(self, logits: Tensor) -> None:
        """Draw a token for each pair and force it on both rows; rows that are alone get their mark.

        Args:
            logits: `(B, V)` float32, changed in place so that the forced token is the greatest.
        """
        if self._together:
            for method, columns in self._elsewhere:
                pairs = unpack(self._packed)
                rows = pairs.rows_theta[columns], pairs.rows_t[columns]
                set_alpha(self._packed, columns, alpha_of_method(method, logits[rows[0]], logits[rows[1]]))
            self._draw(logits, self._packed, self._record)
        if self._apart:
            rows, marks, cells = self._alone
            logits[rows, marks] = FORCED
            self._record[cells] = torch.nan

    def _rebuild(self, rows: list[Row]) -> None:
        sides: dict[Pair, dict[str, Row]] = {}
        for row in rows:
            if self._pairs.get(row.pair.member.pair) is row.pair:  # else taken: what its request still draws is dropped
                sides.setdefault(row.pair, {})[row.side] = row
        together, self._apart = [], []
        for found in sides.values():
            theta, t = found.get("both", found.get("theta")), found.get("both", found.get("t"))
            if theta is not None and t is not None and theta.position == t.position:
                together.append((theta, t))
            else:
                self._apart += found.values()
        self._together = [theta.pair for theta, _ in together]
        if self._apart:
            marks = [row.pair.member.mark for row in self._apart]
            cells = [self._cell(row) for row in self._apart]
            self._alone = self._send(np.array([[row.index for row in self._apart], marks, cells]))
        if together:
            self._send_pairs(together)

    def _send_pairs(self, together: list[tuple[Row, Row]]) -> None:
        members = [theta.pair.member for theta, _ in together]
        methods = [member.method for member in members]
        positions = [member.start + theta.position for member, (theta, _) in zip(members, together, strict=True)]
        self._packed = self._send(
            pack(
                rows=[(theta.index, t.index) for theta, t in together],
                seeds=[member.seed for member in members],
                positions=positions,
                cells=[self._cell(theta) for theta, _ in together],
                methods=methods,
            )
        )
        self._elsewhere = [
            (method, self._send(np.flatnonzero([other == method for other in methods])))
            for method in {method for method in methods if method.alpha_method not in _SOLVED_IN_DRAW}
        ]

    def _cell(self, row: Row) -> int:
        pair = row.pair
        pair.length = max(pair.length, row.position + 1)
        while len(pair.pages) * PAGE < pair.length:
            if not self._free:
                self._grow()
            pair.pages.append(self._free.pop())
        return pair.pages[row.position // PAGE] * PAGE + row.position % PAGE

    def _grow(self) -> None:
        pages = len(self._record) // PAGE
        self._free += range(pages, 2 * pages)
        self._record = torch.cat((self._record, torch.full_like(self._record, torch.nan)))
        logger.info("room for the numbers of %d positions", len(self._record))

    def _send(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)

    @torch.inference_mode()
    def _warm_up(self, vocab_size: int) -> None:
        """Compile `draw` now, and not during the first requests."""
        name = "warm-up"
        member = PairMember(pair=name, side="both", seed=0, start=0, mark=0, method=PairRule())
        self.place(np.arange(1), [(self.open(member), "both")], np.zeros(1, dtype=np.int64), same=False)
        # vLLM pads the vocabulary, and in some cases hands over a slice of that.
        for padded in sorted({vocab_size, -(-vocab_size // _PADDING) * _PADDING}):
            self.apply(torch.zeros(3, padded, device=self._device)[:, :vocab_size])
        self.take([name])


def _draw_of(device: torch.device, backend: str) -> DrawInPlace:
    if device.type != "cuda":
        return compiled_draw(backend)
    from dual_rollout.native.kernel import draw_in_place

    return draw_in_place
