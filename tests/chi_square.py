"""Pearson's chi-square test, without scipy. Also the standard error bound the distribution tests share."""

from __future__ import annotations

import math

import numpy as np


def chi_square_p_value(observed: np.ndarray, expected: np.ndarray) -> float:
    """P(χ² at least as large) for counts against expected counts.

    Cells with expected counts below 5 are pooled into one; a count where 0 is expected gives p = 0.
    """
    observed, expected = np.asarray(observed, dtype=float), np.asarray(expected, dtype=float)
    if (observed[expected == 0] > 0).any():
        return 0.0
    rare = expected < 5
    cells = np.append(observed[~rare], observed[rare].sum())
    means = np.append(expected[~rare], expected[rare].sum())
    cells, means = cells[means > 0], means[means > 0]
    return chi_square_survival(float((np.square(cells - means) / means).sum()), len(means) - 1)


def chi_square_survival(statistic: float, dof: int) -> float:
    """Q(dof/2, statistic/2), by Q(a+1, x) = Q(a, x) + x^a e^(−x) / Γ(a+1) from a = ½ (erfc) or a = 1 (e^−x)."""
    x = statistic / 2
    if x == 0:
        return 1.0
    a, total = (0.5, math.erfc(math.sqrt(x))) if dof % 2 else (1.0, math.exp(-x))
    while a < dof / 2:
        total += math.exp(a * math.log(x) - x - math.lgamma(a + 1))
        a += 1
    return min(total, 1.0)


def standard_errors_off(samples: np.ndarray, expectation: float) -> float:
    """|mean − expectation| in units of the estimated standard error of the mean."""
    return abs(samples.mean() - expectation) / (samples.std(ddof=1) / math.sqrt(len(samples)))
