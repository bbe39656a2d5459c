"""From two lists to one set of candidates, against a dictionary-based implementation written here."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dual_rollout import merge_top_k_candidates
from dual_rollout.functional import TAIL_TOKEN, merge_lists, next_token_distribution
from dual_rollout.functional.candidates import ROUNDING
from dual_rollout.functional.top_k import NO_TOKEN, TopK, at_temperature


def complete(listed: dict[int, float], ids: list[int], support: str) -> list[float]:
    """One model's probabilities on S (and the tail), missing ones floored, normalised."""
    missing = [i for i in ids if i not in listed]
    unlisted = open_mass(listed)
    claimants = len(missing) + (support == "tail")
    floor = min(min(math.exp(v) for v in listed.values()), unlisted / claimants if claimants else 1.0)
    probs = [math.exp(listed[i]) if i in listed else floor for i in ids]
    if support == "tail":
        probs.append(unlisted - floor * len(missing))
    total = math.fsum(probs)
    return [p / total for p in probs]


def open_mass(listed: dict[int, float]) -> float:
    """What a list leaves to others: nothing if it names an impossible token, else what float32 can hide at least."""
    if -math.inf in listed.values():
        return 0.0
    return max(1 - math.fsum(math.exp(v) for v in listed.values()), 2.0**-23)


def reference(theta: dict[int, float], t: dict[int, float], support: str):
    ids = sorted({*theta, *t})
    on_theta, on_t = complete(theta, ids, support), complete(t, ids, support)
    if support == "tail" and on_theta[-1] == 0:
        on_t = [p / math.fsum(on_t[:-1]) for p in on_t[:-1]] + [0.0]  # nothing outside S can be drawn
    return [*ids, TAIL_TOKEN] if support == "tail" else ids, on_theta, on_t


@st.composite
def top_k_lists(draw: st.DrawFn, k: int | None = None) -> dict[int, float]:
    """The k most likely of a random distribution on up to 60 token ids; sometimes all, sometimes with zeros."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    vocabulary = draw(st.integers(k or 1, 60))
    p = np.exp(rng.normal(size=vocabulary) * draw(st.sampled_from([0.0, 1.0, 6.0])))
    if draw(st.booleans()):
        p[rng.random(vocabulary) < 0.2] = 0.0
        p[rng.integers(vocabulary)] = 1.0
    p /= p.sum()
    k = draw(st.integers(1, vocabulary)) if k is None else k
    with np.errstate(divide="ignore"):
        logp = np.log(p)
    top = np.argsort(-p, kind="stable")[:k]
    return {int(i): float(logp[i]) for i in rng.permutation(top)}


@given(top_k_lists(), top_k_lists(), st.sampled_from(["union", "tail"]))
def test_equals_the_dictionary_implementation(theta, t, support):
    ids, probs_theta, probs_t = merge_top_k_candidates(theta, t, support=support)
    expected_ids, expected_theta, expected_t = reference(theta, t, support)
    assert ids.tolist() == expected_ids
    np.testing.assert_allclose(probs_theta, expected_theta, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(probs_t, expected_t, rtol=1e-9, atol=1e-14)


@given(top_k_lists(), top_k_lists(), st.sampled_from(["union", "tail"]))
def test_probabilities_sum_to_one_over_ascending_ids(theta, t, support):
    ids, probs_theta, probs_t = merge_top_k_candidates(theta, t, support=support)
    real = ids[:-1] if support == "tail" else ids
    assert (np.diff(real) > 0).all()
    assert set(real.tolist()) == {*theta, *t}
    for probs in (probs_theta, probs_t):
        assert (probs >= 0).all() and probs.sum() == pytest.approx(1, abs=1e-12)


@given(top_k_lists(), top_k_lists())
def test_a_floor_never_exceeds_what_the_list_allows(theta, t):
    candidates = merge_lists(as_top_k([theta]), as_top_k([t]), "tail")
    for listed, logp, exact in (
        (theta, candidates.logp_theta[0], candidates.exact_theta[0]),
        (t, candidates.logp_t[0], candidates.exact_t[0]),
    ):
        real = candidates.token_ids[0] != NO_TOKEN
        missing = real & np.isnan(exact)
        # Without a tail, which π_θ alone decides on, what is left is normalised.
        possible = real & np.isfinite(exact)
        scale = np.exp(logp[possible] - exact[possible]).max(initial=1.0)
        floors = np.exp(logp[missing])
        assert (floors <= scale * min(map(math.exp, listed.values())) + 1e-12).all()
        assert floors.sum() <= scale * open_mass(listed) + 1e-12


@given(top_k_lists(), top_k_lists())
def test_the_tail_keeps_mass_wherever_the_lists_leave_some(theta, t):
    """Else q* would lose the policy's support, and weighted means would be biased without a sign of it."""
    _, probs_theta, probs_t = merge_top_k_candidates(theta, t, support="tail")
    for listed, other, probs in ((theta, t, probs_theta), (t, theta, probs_t)):
        if open_mass(theta) > 0:
            assert probs[-1] >= open_mass(listed) / (len(other.keys() - listed.keys()) + 1) * (1 - 1e-4)


@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.sampled_from(["union", "tail"]))
def test_the_distribution_does_not_jump_where_a_list_sums_to_one(seed, k, support):
    """Rounded to float32, a peaked list may hold all mass or more. What it leaves open does not vanish there."""
    rng = np.random.default_rng(seed)
    tops = []
    for peak in rng.uniform(0, 40, 2):
        logits = rng.normal(size=40)
        logits[rng.integers(40)] += peak
        logp = (logits - np.log(np.exp(logits).sum())).astype(np.float32)
        tops.append({int(i): float(logp[i]) for i in np.argsort(-logp)[:k]})
    distribution, nearby = (
        next_token_distribution(
            merge_lists(*(as_top_k([{i: v - step for i, v in top.items()}]) for top in tops), support)
        )
        for step in (0.0, 1e-10)
    )
    listed = len({*tops[0], *tops[1]})
    assert np.isfinite(distribution.log_q).sum() == listed + (support == "tail")  # full support, and never disjoint
    # The least open mass is 1.2e-7: a thousand times the step.
    np.testing.assert_allclose(np.exp(nearby.log_q), np.exp(distribution.log_q), atol=0.01)
    assert nearby.alpha == pytest.approx(distribution.alpha, abs=0.01)


def test_a_certain_policy_leaves_the_target_its_say():
    """π_θ lists one token at 0.0, which a hair less would not change: q* keeps a tail, which π_θ can draw."""
    distributions = [
        next_token_distribution(merge_lists(as_top_k([{5: certain}]), as_top_k([{5: math.log(0.9)}]), "tail"))
        for certain in (0.0, -1e-9, -1.2e-7)
    ]
    for distribution in distributions:
        assert (
            distribution.alpha == pytest.approx(distributions[0].alpha, abs=1e-3) and 0.8 < distribution.alpha[0] < 0.85
        )
        np.testing.assert_allclose(np.exp(distribution.log_q[:, [0, -1]]), [[0.992, 0.008]], atol=1e-3)


def test_a_complete_list_leaves_nothing_open():
    whole = TopK(np.arange(3)[None], np.log([[0.5, 0.3, 0.2]]), complete=True, vocab_size=3)
    for other in (whole, TopK(np.array([[1]]), np.log([[0.9]]), vocab_size=3)):
        for pair in ((whole, other), (other, whole)):
            candidates = merge_lists(*pair, "tail")
            assert candidates.logp_theta[0, -1] == candidates.logp_t[0, -1] == -np.inf
    impossible = TopK(np.array([[0, 1]]), np.log([[0.5, 0.5]]), complete=True)
    disjoint = TopK(np.array([[2, 3]]), np.log([[0.5, 0.5]]), complete=True)
    assert next_token_distribution(merge_lists(impossible, disjoint, "tail")).disjoint.all()


def test_there_is_no_tail_where_both_lists_hold_the_vocabulary_together():
    theta = TopK(np.array([[0, 1]]), np.log([[0.5, 0.3]]), vocab_size=3)
    t = TopK(np.array([[0, 2]]), np.log([[0.6, 0.2]]), vocab_size=3)
    candidates = merge_lists(theta, t, "tail")
    ids = [np.flatnonzero(candidates.token_ids[0] == token)[0] for token in range(3)]
    np.testing.assert_allclose(np.exp(candidates.logp_theta[0, [*ids, -1]]), [0.5, 0.3, 0.2, 0])
    np.testing.assert_allclose(np.exp(candidates.logp_t[0, [*ids, -1]]), [0.6, 0.2, 0.2, 0])
    larger = [replace(top, vocab_size=4) for top in (theta, t)]
    assert np.isfinite(merge_lists(*larger, "tail").logp_theta[0, -1])


def test_very_unlikely_tokens_are_normalised_too():
    _, probs_theta, probs_t = merge_top_k_candidates({5: -800.0, 6: -801.0}, {5: -1.0, 6: -2000.0})
    np.testing.assert_allclose(probs_theta, [1 / (1 + math.exp(-1)), 1 / (1 + math.e)])
    np.testing.assert_allclose(probs_t, [1.0, 0.0], atol=1e-300)


def as_top_k(rows: list[dict[int, float]], width: int | None = None) -> TopK:
    width = width or max(map(len, rows))
    ids, logprobs = np.full((len(rows), width), NO_TOKEN), np.full((len(rows), width), -np.inf)
    for i, row in enumerate(rows):
        ids[i, : len(row)], logprobs[i, : len(row)] = list(row), list(row.values())
    return TopK(ids, logprobs, complete=np.array([-math.inf in row.values() for row in rows]))


@given(st.lists(st.tuples(top_k_lists(), top_k_lists()), min_size=1, max_size=12), st.sampled_from(["union", "tail"]))
def test_batch_equals_singles(pairs, support):
    width = max(len(row) for pair in pairs for row in pair)
    thetas, ts = ([pair[side] for pair in pairs] for side in (0, 1))
    batch = merge_lists(as_top_k(thetas, width), as_top_k(ts, width), support)
    for row, (theta, t) in enumerate(pairs):
        single = merge_lists(as_top_k([theta], width), as_top_k([t], width), support)
        for name in ("token_ids", "logp_theta", "logp_t", "exact_theta", "exact_t", "coverage_theta", "coverage_t"):
            np.testing.assert_array_equal(getattr(batch, name)[row], getattr(single, name)[0], err_msg=name)
        ids, probs_theta, probs_t = merge_top_k_candidates(theta, t, support=support)
        kept = batch.token_ids[row] != NO_TOKEN
        kept[-1] |= support == "tail"
        assert batch.token_ids[row][kept].tolist() == ids.tolist()
        np.testing.assert_allclose(np.exp(batch.logp_theta[row][kept]), probs_theta, rtol=1e-9, atol=1e-14)
        np.testing.assert_allclose(np.exp(batch.logp_t[row][kept]), probs_t, rtol=1e-9, atol=1e-14)


@given(top_k_lists(), top_k_lists())
def test_exact_values_and_missing_ids(theta, t):
    candidates = merge_lists(as_top_k([theta]), as_top_k([t]))
    for listed, other, exact in ((theta, t, candidates.exact_theta), (t, theta, candidates.exact_t)):
        assert candidates.missing(0, exact) == sorted(other.keys() - listed.keys())
        for token, value in zip(candidates.token_ids[0].tolist(), exact[0].tolist(), strict=True):
            assert value == listed[token] if token in listed else math.isnan(value)
    assert candidates.coverage_theta[0] == pytest.approx(sum(map(math.exp, theta.values())))
    assert candidates.coverage_t[0] == pytest.approx(sum(map(math.exp, t.values())))


def test_holes_have_no_probability():
    candidates = merge_lists(as_top_k([{3: -0.1}, {1: -1.0, 2: -1.0}]), as_top_k([{3: -0.2}, {7: -1.0, 8: -1.0}]))
    holes = candidates.token_ids == NO_TOKEN
    assert holes.sum(axis=1).tolist() == [3, 0]
    assert (candidates.logp_theta[holes] == -np.inf).all() and np.isnan(candidates.exact_theta[holes]).all()


def test_lists_of_different_width():
    theta, t = {5: math.log(0.6)}, {5: math.log(0.3), 1: math.log(0.3), 9: math.log(0.4)}
    ids, probs_theta, probs_t = merge_top_k_candidates(theta, t)
    assert ids.tolist() == [1, 5, 9]
    np.testing.assert_allclose(probs_theta, [0.2, 0.6, 0.2])  # 0.4 open, two missing
    np.testing.assert_allclose(probs_t, [0.3, 0.3, 0.4])


def test_ties_keep_every_token_once():
    same = math.log(0.25)
    ids, probs_theta, probs_t = merge_top_k_candidates({4: same, 2: same}, {2: same, 9: same, 4: same})
    assert ids.tolist() == [2, 4, 9]
    np.testing.assert_allclose(probs_theta, [1 / 3] * 3)
    np.testing.assert_allclose(probs_t, [1 / 3] * 3)


def test_impossible_tokens_stay_candidates_without_mass():
    ids, probs_theta, probs_t = merge_top_k_candidates({1: 0.0, 2: -math.inf}, {2: math.log(0.5), 3: math.log(0.5)})
    assert ids.tolist() == [1, 2, 3]
    assert probs_theta.tolist() == [1.0, 0.0, 0.0]
    np.testing.assert_allclose(probs_t, [0.0, 0.5, 0.5], atol=2e-7)


def test_inputs_are_left_alone():
    top = as_top_k([{3: -0.1}, {1: -1.0, 2: -1.0}])
    before = top.token_ids.copy(), top.logprobs.copy()
    merge_lists(top, top, "tail")
    at_temperature(top, 0.5)
    np.testing.assert_array_equal(top.token_ids, before[0])
    np.testing.assert_array_equal(top.logprobs, before[1])


@pytest.mark.parametrize(
    ("theta", "t", "name"),
    [
        ({}, {1: -1.0}, "logprobs_theta"),
        ({1: -1.0}, {}, "logprobs_t"),
        ({-1: -1.0}, {1: -1.0}, "logprobs_theta"),
        ({1: -1.0}, {1: math.nan}, "logprobs_t"),
        ({1: -1.0}, {1: 0.5}, "logprobs_t"),
        ({1: -math.inf}, {1: -1.0}, "logprobs_theta"),
    ],
)
def test_bad_lists_are_refused_by_name(theta, t, name):
    with pytest.raises(ValueError, match=rf"^{name} must"):
        merge_top_k_candidates(theta, t)


def test_unknown_support_is_refused():
    with pytest.raises(ValueError, match=r"support.*whole"):
        merge_top_k_candidates({1: -1.0}, {1: -1.0}, support="whole")


def tempered(p: np.ndarray, temperature: float) -> np.ndarray:
    scaled = p ** (1 / temperature)
    return scaled / scaled.sum()


@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.floats(0.3, 3.0))
def test_temperature_is_exact_when_the_list_holds_all_mass(seed, vocabulary, temperature):
    p = np.random.default_rng(seed).dirichlet(np.ones(vocabulary))
    result = at_temperature(TopK(np.arange(vocabulary)[None], np.log(p)[None]), temperature)
    # Rounding leaves up to 1e-16 open; at T > 1 its share grows to (1e-16)^(1/T) at most.
    np.testing.assert_allclose(np.exp(result.logprobs[0]), tempered(p, temperature), rtol=1e-4)


@given(st.integers(0, 2**32 - 1), st.integers(2, 60), st.floats(0.3, 3.0), st.data())
def test_temperature_bounds_when_mass_is_left_open(seed, vocabulary, temperature, data):
    """What is open counts as if it were as likely as the last listed: too much below T = 1, too little above."""
    p = np.sort(np.random.default_rng(seed).dirichlet(np.ones(vocabulary)))[::-1]
    k = data.draw(st.integers(1, vocabulary - 1))
    result = np.exp(at_temperature(TopK(np.arange(k)[None], np.log(p[:k])[None]), temperature).logprobs[0])
    exact = tempered(p, temperature)[:k]
    truncated = tempered(p[:k], temperature)
    assert (result <= truncated * (1 + 1e-9)).all()
    assert (result <= exact * (1 + 1e-9)).all() if temperature <= 1 else (result >= exact * (1 - 1e-9)).all()


def test_temperature_leaves_padding_impossible():
    result = at_temperature(as_top_k([{1: math.log(0.5), 2: math.log(0.5)}, {4: 0.0}]), 0.7)
    assert result.logprobs[1].tolist() == [0.0, -math.inf]


# ---- vocabularies of different sizes --------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.sampled_from(["union", "tail"]))
def test_ids_that_only_one_model_has_are_no_candidates(seed, support):
    """Neither do they change what the others get: their mass is not open, and the smallest listed one bounds floors."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(4, 12, size=2)
    k = int(rng.integers(1, 4))
    lists = []
    for size in sizes:
        p = rng.dirichlet(np.ones(size))
        ids = np.argsort(-p)[:k]
        lists.append(TopK(ids[None], np.log(p[ids])[None], False, int(size)))
    merged = merge_lists(*lists, support)
    common = min(sizes)
    listed = {int(i) for top in lists for i in top.token_ids[0] if i < common}
    assert {int(i) for i in merged.token_ids[0] if i != NO_TOKEN} == listed
    assert merged.theta_alone == range(common, sizes[0])
    for logp, exact, top in (
        (merged.logp_theta, merged.exact_theta, lists[0]),
        (merged.logp_t, merged.exact_t, lists[1]),
    ):
        own = dict(zip(top.token_ids[0].tolist(), top.logprobs[0].tolist(), strict=True))
        open_mass, smallest = 1 - np.exp(top.logprobs).sum(), top.logprobs.min()
        missing = [i for i in listed if i not in own]
        tail = support == "tail" and len(listed) < common
        floor = min(np.exp(smallest), max(open_mass, ROUNDING) / max(len(missing) + tail, 1))
        values = {i: np.exp(own[i]) if i in own else floor for i in listed}
        total = sum(values.values()) + tail * (max(open_mass, ROUNDING) - floor * len(missing))
        for column, token in enumerate(merged.token_ids[0].tolist()):
            if token != NO_TOKEN:
                assert np.exp(logp[0, column]) == pytest.approx(values[token] / total, rel=1e-9)
                assert exact[0, column] == pytest.approx(own.get(token, np.nan), nan_ok=True)
    known = tail and sizes[0] <= sizes[1] and listed <= set(lists[0].token_ids[0].tolist())
    assert np.isnan(merged.exact_tail[0]) != known
    if known:
        assert np.exp(merged.exact_tail[0]) == pytest.approx(
            max(1 - np.exp(lists[0].logprobs).sum(), ROUNDING), abs=1e-12
        )


def test_a_policy_that_can_only_say_what_the_target_lacks_leaves_the_position_to_the_target():
    theta = TopK(np.array([[5, NO_TOKEN]]), np.array([[0.0, -np.inf]]), np.array([True]), 6)
    t = TopK(np.array([[0, 1]]), np.log([[0.6, 0.3]]), np.array([False]), 4)
    distribution = next_token_distribution(merge_lists(theta, t))
    assert distribution.disjoint.tolist() == [True] and distribution.alpha.tolist() == [1.0]
    assert np.exp(distribution.log_q[0]).max() == pytest.approx(2 / 3)


def test_one_size_for_both_models():
    candidates, theta, t = merge_top_k_candidates({0: -0.5, 1: -1.5}, {0: -0.7, 4: -0.9}, vocab_size=3)
    assert candidates.tolist() == [0, 1]
    assert theta.sum() == pytest.approx(1) and t.sum() == pytest.approx(1)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-4, 1e-3, 0.03, 50.0]))
def test_extreme_temperatures_neither_underflow_nor_overflow(seed, temperature):
    """The most likely token keeps all but what the list leaves open, and weights are finite."""
    rng = np.random.default_rng(seed)
    lists = []
    for _ in range(2):
        p = rng.dirichlet(np.full(12, 0.5))
        ids = np.argsort(-p)[:6]
        raw = TopK(ids[None], np.log(p[ids])[None], False, 12)
        tempered = at_temperature(raw, temperature)
        assert np.exp(tempered.logprobs).sum() <= 1 + 1e-9 and not np.isnan(tempered.logprobs).any()
        ratios = np.diff(raw.logprobs[0]) / temperature
        np.testing.assert_allclose(np.diff(tempered.logprobs[0]), ratios, rtol=1e-6, atol=1e-9)
        lists.append(tempered)
    candidates = merge_lists(*lists)
    distribution = next_token_distribution(candidates)
    q = np.exp(distribution.log_q)
    assert q.sum() == pytest.approx(1)
    weights = np.exp((candidates.exact_theta - distribution.log_q)[(q > 1e-6) & ~np.isnan(candidates.exact_theta)])
    assert np.all(weights <= 1e6 * (1 + 1e-9))
