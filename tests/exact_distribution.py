"""α and q* of a position from the definitions, by bisection and with plain lists; shares no code with the package.

Options are the fields of `CoordinatorConfig`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

FEWEST_LISTED = 16  # with top_k "auto"
FLOAT32_EPS = 2.0**-23


def tempered(p: np.ndarray, temperature: float) -> np.ndarray:
    scaled = p ** (1 / temperature)
    return scaled / scaled.sum()


def listed(p: np.ndarray, options: dict[str, Any]) -> list[int]:
    """The tokens of the list that a distribution is made of, the most likely first."""
    ranked = sorted(range(len(p)), key=lambda y: -p[y])
    if options["top_k"] != "auto":
        return ranked[: options["top_k"]]
    count, mass = 0, 0.0
    while count < len(ranked) and (count < FEWEST_LISTED or mass < options["top_k_mass"]):
        mass += p[ranked[count]]
        count += 1
    return ranked[:count]


def position_distribution(p: np.ndarray, r: np.ndarray, options: dict[str, Any]) -> tuple[float, np.ndarray]:
    """α, and q* on the vocabulary that both have, of a position where π_θ is `p` and π_t is `r`."""
    size = min(len(p), len(r))
    ids = sorted(y for y in {*listed(p, options), *listed(r, options)} if y < size)
    a, b = _on_candidates(p, ids, size, options), _on_candidates(r, ids, size, options)
    alpha = _alpha(a, b, options)
    path = [x ** (1 - alpha) * y**alpha if x > 0 and y > 0 else 0.0 for x, y in zip(a, b, strict=True)]
    q = np.zeros(size)
    q[ids] = np.array(path[: len(ids)]) / sum(path)
    if len(path) > len(ids):
        outside = np.setdiff1d(np.arange(size), ids)
        q[outside] = path[-1] / sum(path) * p[outside] / max(p[outside].sum(), 1e-300)
    return alpha, q


def _on_candidates(p: np.ndarray, ids: list[int], size: int, options: dict[str, Any]) -> list[float]:
    """p on S, and on the tail if there is one, as the lists tell it."""
    top = listed(p, options)
    missing = [y for y in ids if y not in top]
    tail = options.get("support") == "tail" and len(ids) < size
    if options.get("missing") == "exact":
        top, missing = [*top, *missing], []
    open_mass = max(1 - sum(p[y] for y in top), FLOAT32_EPS)
    floor = min(p[top[-1]], open_mass / max(len(missing) + tail, 1))
    values = [floor if y in missing else float(p[y]) for y in ids]
    if tail:
        values.append(open_mass - floor * len(missing))
    return [value / sum(values) for value in values]


def _alpha(a: list[float], b: list[float], options: dict[str, Any]) -> float:
    if options.get("alpha_method") == "fixed":
        alpha = options["fixed_alpha"]
    else:
        shared = [(x, y) for x, y in zip(a, b, strict=True) if x > 0 and y > 0]
        if all(abs(x - y) < 1e-12 for x, y in shared):
            return 0.5
        low, high = 0.0, 1.0
        for _ in range(80):
            alpha = (low + high) / 2
            slope = sum(x ** (1 - alpha) * y**alpha * math.log(y / x) for x, y in shared)
            low, high = (alpha, high) if slope < 0 else (low, alpha)
    return min(max(alpha, options.get("alpha_min", 0.0)), options.get("alpha_max", 1.0))
