"""The kernel that draws pairs on a GPU against the same in torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dual_rollout.native.draw import FORCED, draw, pack, unpack
from dual_rollout.native.rule import NUMBERS, PairRule
from tests.chi_square import chi_square_p_value

RULES = (
    PairRule(),
    PairRule(temperature=0.7),
    PairRule(alpha_max=0.2),
    PairRule(alpha_method="fixed", fixed_alpha=0.3),
    PairRule(alpha_method="fixed", fixed_alpha=1.0),
)


def rows_of(pairs: int, vocab: int) -> torch.Tensor:
    """Logits of both sides, which are near, with tokens that one side or the other cannot say."""
    generator = torch.Generator(device="cuda").manual_seed(pairs)
    theta, noise = (3.0 * torch.randn(pairs, vocab, generator=generator, device="cuda") for _ in range(2))
    rows = torch.stack((theta, 0.95 * theta + 0.3 * noise), 1).reshape(2 * pairs, vocab)
    rows[0, : vocab // 4], rows[1, vocab // 2 :] = -torch.inf, -torch.inf
    return rows


def packed(pairs: int) -> torch.Tensor:
    rules = [RULES[i % len(RULES)] for i in range(pairs)]
    rows, seeds = [(2 * i, 2 * i + 1) for i in range(pairs)], [i + (i << 40) for i in range(pairs)]
    return torch.from_numpy(pack(rows, seeds, [5] * pairs, range(pairs), rules)).cuda()


@pytest.mark.parametrize("pairs", [1, 5, 64])
@pytest.mark.parametrize("vocab", [1000, 49152, 151936])
def test_the_kernel_draws_what_torch_does(pairs: int, vocab: int) -> None:
    from dual_rollout.native.kernel import draw_in_place

    logits, columns, record = rows_of(pairs, vocab), packed(pairs), torch.zeros(pairs, len(NUMBERS), device="cuda")
    _, numbers = draw(logits, unpack(columns))
    forced = logits.clone()
    draw_in_place(forced, columns, record)
    same = record[:, 0] == numbers[:, 0]  # else two clocks rang within a rounding of each other
    assert same.float().mean() >= 0.98
    torch.testing.assert_close(record[same], numbers[same], atol=2e-5, rtol=1e-5)
    both = torch.arange(2 * pairs, device="cuda"), record[:, 0].long().repeat_interleave(2)
    assert (forced[both] == FORCED).all() and (forced != logits).sum() == 2 * pairs
    assert columns[4].tolist() == [6] * pairs and columns[5].tolist() == list(range(1, pairs + 1))


def test_the_kernels_draws_follow_the_distribution() -> None:
    """Chi-square over 20,000 seeds, false alarm one in 10,000."""
    from dual_rollout.native.kernel import draw_in_place

    count, vocab = 20_000, 300
    logits = rows_of(2, vocab)[2:]
    rows = [(2 * i, 2 * i + 1) for i in range(count)]
    columns = torch.from_numpy(pack(rows, range(count), [0] * count, range(count), [PairRule()] * count)).cuda()
    record = torch.zeros(count, len(NUMBERS), device="cuda")
    draw_in_place(logits.repeat(count, 1), columns, record)
    alpha, logp = record[0, 1].double(), logits.double().log_softmax(1)
    expected = ((1 - alpha) * logp[0] + alpha * logp[1]).softmax(0).cpu().numpy()
    drawn = np.bincount(record[:, 0].long().cpu().numpy(), minlength=vocab)
    assert chi_square_p_value(drawn, count * expected) > 1e-4
