"""Supervised steps on completions: for the teacher, and for the arms that imitate it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_IGNORED = -100


class Optimiser:
    """AdamW with a linear warm-up to a constant rate and clipped gradients, as in the GRPO arms."""

    def __init__(self, model: Any, learning_rate: float, *, warmup_steps: int = 5):
        self._model = model
        self._adam = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._adam, lambda n: min(1.0, (n + 1) / (warmup_steps + 1)))

    def step(self, losses: Iterator[Tensor]) -> float:
        """One update by the sum of the losses, each of which is differentiated before the next is made."""
        total = 0.0
        for loss in losses:
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self._schedule.step()
        return total


def imitate(
    model: Any, optimiser: Optimiser, rows: Sequence[tuple[Sequence[int], Sequence[int]]], *, micro: int = 32
) -> float:
    """One update by the mean cross-entropy of the completions' tokens, in nats; which it returns.

    Args:
        rows: prompt and completion as token ids, the stop token with the completion.
    """
    count = sum(len(completion) for _, completion in rows)

    def losses() -> Iterator[Tensor]:
        for start in range(0, len(rows), micro):
            ids, mask, labels = batch(rows[start : start + micro], next(model.parameters()).device)
            logits = completion_logits(model, ids, mask, labels)
            yield F.cross_entropy(logits, labels[:, 1:][labels[:, 1:] != _IGNORED], reduction="sum") / count

    return optimiser.step(losses())


def distil(
    model: Any,
    teacher: Any,
    optimiser: Optimiser,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    micro: int = 32,
) -> float:
    """One update by the mean of KL(π_θ‖π_t) over the positions of the policy's own completions; which it returns.

    It is the loss of on-policy distillation (Agarwal et al. 2024, arXiv:2306.13649, reverse KL; TRL's
    `DistillationTrainer` with beta 1).
    """
    count = sum(len(completion) for _, completion in rows)

    def losses() -> Iterator[Tensor]:
        for start in range(0, len(rows), micro):
            ids, mask, labels = batch(rows[start : start + micro], next(model.parameters()).device)
            with torch.no_grad():
                target = completion_logits(teacher, ids, mask, labels).log_softmax(-1)
            policy = completion_logits(model, ids, mask, labels).log_softmax(-1)
            yield (policy.exp() * (policy - target)).sum() / count

    return optimiser.step(losses())


def completion_logits(model: Any, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """The logits by which the completions' tokens are predicted, `(N, V)` in the order of rows and positions."""
    hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1]
    return model.get_output_embeddings()(hidden[labels[:, 1:] != _IGNORED]).float()


def batch(rows: Sequence[tuple[Sequence[int], Sequence[int]]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and labels (-100 outside the completion) padded on the right, `(B, T)` each."""
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, _IGNORED)
    for i, (prompt, completion) in enumerate(rows):
        length = len(prompt) + len(completion)
        ids[i, :length] = torch.tensor([*prompt, *completion])
        mask[i, :length] = 1
        labels[i, len(prompt) : length] = torch.tensor(list(completion))
    return ids.to(device), mask.to(device), labels.to(device)


def imitate_until(
    model: Any,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    enough: Callable[[], bool],
    *,
    check_every: int,
    max_steps: int,
    batch_size: int,
    learning_rate: float,
) -> int:
    """Imitate random rows until `enough` says so, asked every `check_every` updates; the updates made."""
    optimiser = Optimiser(model, learning_rate, warmup_steps=20)
    order = torch.Generator().manual_seed(0)
    for step in range(1, max_steps + 1):
        chosen = torch.randint(len(rows), (batch_size,), generator=order).tolist()
        imitate(model, optimiser, [rows[i] for i in chosen])
        if step % check_every == 0 and enough():
            return step
    return max_steps
