"""The measurement of recipes/evidence/approximation.py, on made-up distributions, and its table in the docs."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from dual_rollout import compute_diagnostics, compute_q_star, solve_kl_symmetry
from dual_rollout.functional import merge_lists, next_token_distribution
from dual_rollout.functional.diagnostics import log_diagnostics
from dual_rollout.types import TopK

SCRIPT = Path(__file__).parents[2] / "recipes" / "evidence" / "approximation.py"


@pytest.fixture(scope="module")
def approximation():
    spec = importlib.util.spec_from_file_location("approximation", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_longer_lists_come_nearer_and_the_tail_loses_nothing(approximation):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 8, 1500)) * 3.0
    logits[1] = 0.9 * logits[0] + 0.4 * logits[1]
    logp = logits - np.log(np.exp(logits).sum(axis=2, keepdims=True))
    found = dict(approximation.compared(*logp))
    assert set(found) == {f"{support} {k}" for support in approximation.SUPPORTS for k in approximation.LENGTHS}
    for support in approximation.SUPPORTS:
        errors = [found[f"{support} {k}"]["total_variation"].mean() for k in approximation.LENGTHS]
        assert errors == sorted(errors, reverse=True) and errors[-1] < 0.02 < errors[0]
    for k in approximation.LENGTHS:
        lost = found[f"union {k}"]["lost_policy_mass"]
        ids = [set(np.argsort(-rows)[:k].tolist()) for rows in np.concatenate(list(logp))]
        unions = [ids[i] | ids[i + 8] for i in range(8)]
        expected = [1 - np.exp(logp[0][i][sorted(union)]).sum() for i, union in enumerate(unions)]
        np.testing.assert_allclose(lost, expected, atol=1e-9)
        assert found[f"tail {k}"]["lost_policy_mass"].max() == 0.0


def test_the_table_in_the_docs_is_that_of_the_results(approximation):
    table = approximation.table(json.loads(approximation.RESULTS.read_text()))
    assert table in (SCRIPT.parents[2] / "docs" / "mathematics.md").read_text()


def test_no_constant_bounds_the_error_by_the_coverage():
    """A list says of what it lacks only that it is not likelier than the last one listed. With π_θ(y) → 0 for the one
    token that π_t is sure of, the divergence grows without end, and that of two lists of one token hardly."""
    errors = []
    for rare in (1e-10, 1e-30, 1e-100):
        theta, t = np.array([0.5, 0.5 - rare, rare]), np.array([rare / 2, rare / 2, 1.0 - rare])
        alpha = solve_kl_symmetry(theta, t)
        full = compute_diagnostics(theta, t, compute_q_star(theta, t, alpha), alpha)["kl_theta"]
        lists = [TopK(np.array([[i]]), np.log([[p[i]]]), False, 3) for p, i in ((theta, 0), (t, 2))]
        candidates = merge_lists(*lists)
        found = next_token_distribution(candidates)
        kl = log_diagnostics(candidates.logp_theta, candidates.logp_t, found.log_q, found.alpha)["kl_theta"][0]
        assert candidates.coverage_theta[0] == pytest.approx(0.5)
        errors.append(full - kl)
    assert errors[0] > 5.0 and errors[1] > 2 * errors[0] and errors[2] > 2 * errors[1]
