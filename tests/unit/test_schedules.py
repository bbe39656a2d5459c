from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dual_rollout import CoordinatorConfig
from dual_rollout.training.schedules import AlphaSchedule, training_progress

BUDGETED = CoordinatorConfig(alpha_method="kl_budget", kl_budget=0.4, alpha_max=0.9)


def test_constant_changes_nothing():
    assert AlphaSchedule().at(BUDGETED, 0.7) == BUDGETED


@pytest.mark.parametrize(
    ("shape", "halfway", "quarter"), [("linear", 0.2, 0.3), ("cosine", 0.2, 0.4 - 0.4 * (1 - 0.5**0.5) / 2)]
)
def test_the_path_of_a_value(shape, halfway, quarter):
    schedule = AlphaSchedule(shape=shape, kl_budget_end=0.0)
    budgets = [schedule.at(BUDGETED, progress).kl_budget for progress in (0.0, 0.25, 0.5, 1.0)]
    assert budgets == pytest.approx([0.4, quarter, halfway, 0.0])
    assert budgets[-1] == 0, "exactly on-policy at the end"


@given(st.floats(0, 1), st.floats(0, 1), st.sampled_from(["linear", "cosine"]), st.floats(0, 1), st.floats(0, 2))
def test_values_stay_between_their_ends_and_move_one_way(first, second, shape, alpha_end, budget_end):
    schedule = AlphaSchedule(shape=shape, alpha_max_end=alpha_end, kl_budget_end=budget_end)
    early, late = sorted((first, second))
    for name, end in (("alpha_max", alpha_end), ("kl_budget", budget_end)):
        start = getattr(BUDGETED, name)
        a, b = (getattr(schedule.at(BUDGETED, progress), name) for progress in (early, late))
        assert min(start, end) - 1e-12 <= a <= max(start, end) + 1e-12
        assert (b - a) * (end - start) >= -1e-12


def test_other_fields_are_left_alone():
    moved = AlphaSchedule(shape="linear", alpha_max_end=0.1).at(BUDGETED, 0.5)
    assert moved == CoordinatorConfig(alpha_method="kl_budget", kl_budget=0.4, alpha_max=moved.alpha_max)
    assert moved.alpha_max == pytest.approx(0.5)


def test_a_fixed_alpha_and_the_lower_bound_move_too():
    fixed = CoordinatorConfig(alpha_method="fixed", fixed_alpha=0.8)
    assert AlphaSchedule(shape="linear", fixed_alpha_end=0.0).at(fixed, 0.75).fixed_alpha == pytest.approx(0.2)
    both = AlphaSchedule(shape="cosine", alpha_min_end=0.4, alpha_max_end=0.4)
    assert set(both.ends) == {"alpha_min", "alpha_max"}
    for progress in (0.0, 0.3, 0.999, 1.0):
        moved = both.at(BUDGETED, progress)
        assert 0 <= moved.alpha_min <= 0.4 <= moved.alpha_max <= 0.9
    assert moved.alpha_min == moved.alpha_max == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"shape": "exponential"}, "alpha_schedule must be one of"),
        ({"shape": "linear"}, "needs one of kl_budget_end, fixed_alpha_end"),
        ({"kl_budget_end": 0.0}, "alpha_schedule is 'constant'"),
    ],
)
def test_a_schedule_that_says_nothing_is_refused(options, named):
    with pytest.raises(ValueError, match=named):
        AlphaSchedule(**options)


@pytest.mark.parametrize(
    ("schedule", "config", "named"),
    [
        ({"kl_budget_end": 0.0}, {}, "kl_budget_end needs alpha_method"),
        ({"fixed_alpha_end": 0.0}, {}, "fixed_alpha_end needs alpha_method"),
        ({"alpha_min_end": 0.5}, {"alpha_max": 0.4}, "alpha_min"),
        ({"kl_budget_end": -1.0}, {"alpha_method": "kl_budget", "kl_budget": 0.1}, "^kl_budget must be"),
        ({"alpha_max_end": 0.2}, {"alpha_min": 0.3}, "alpha_min"),
        ({"alpha_max_end": 1.2}, {}, "alpha_max"),
    ],
)
def test_an_end_that_does_not_fit_the_config_is_refused(schedule, config, named):
    with pytest.raises(ValueError, match=named):
        AlphaSchedule(shape="linear", **schedule).at(CoordinatorConfig(**config), 1.0)


def test_progress_ends_with_the_last_step():
    assert [training_progress(step, 5) for step in range(7)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert training_progress(0, 1) == training_progress(0, 0) == 0.0
