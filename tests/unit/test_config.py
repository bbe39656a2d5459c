from __future__ import annotations

import dataclasses
import math
import pickle

import pytest

from dual_rollout import CoordinatorConfig

FIELDS = {field.name: field for field in dataclasses.fields(CoordinatorConfig)}

INVALID = {
    "theta_url": ["", "127.0.0.1:8000", "ftp://host", "http://", None, 8000, [], "http://h:x", "http://h?a=b"],
    "t_url": ["", "localhost", None, ["http://a", "http://a/"], ["http://a", 3], "http://user:pw@host"],
    "targets": [{"none": "http://a"}, {"a": "b"}, {"a": []}, {"": "http://a"}, {1: "http://a"}, ["http://a"], "a"],
    "on_target_failure": ["retry", None],
    "theta_engine": ["", "tgi", None],
    "t_engine": ["SGLang", 1],
    "engine": ["both", None],
    "theta_model": ["", 3],
    "t_model": ["", ["a"]],
    "tokenizer": ["", 1],
    "parse_special_tokens": ["yes", 1, None],
    "long_prompts": ["truncate", None],
    "top_k": [0, -1, 2.5, "100", True, None, "Auto"],
    "top_k_mass": [0, 1, 1.5, "0.9", None],
    "support": ["", "all", None],
    "missing": ["guess", 1],
    "decoding": ["fast", None],
    "num_draft_tokens": [0, -1, 2.5, "4", True],
    "alpha_method": ["newton", None],
    "fixed_alpha": [0.5],  # without alpha_method "fixed"
    "kl_budget": [0.5],  # without alpha_method "kl_budget"
    "alpha_min": [-0.1, 1.5, math.nan, "0", None],
    "alpha_max": [-0.1, 1.5, math.nan, True],
    "temperature": [0, -1.0, math.inf, math.nan, "1"],
    "seed": [-1, 1.5, True],
    "ignore_eos": ["false", 1, None],
    "max_concurrency": [0, 1.5],
    "max_retries": [-1, 0.5, True],
    "request_timeout": [0, -1, math.inf, None],
    "total_timeout": [0, math.nan],
    "connection_pool_size": [0, "32"],
    "show_progress": ["yes", 0],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in INVALID.items() for value in values])
def test_a_bad_value_names_its_field(name, value):
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        CoordinatorConfig(**{name: value})


@pytest.mark.parametrize("value", [None, -0.1, 1.1, math.nan, "half", True])
def test_a_bad_fixed_alpha_names_its_field(value):
    with pytest.raises(ValueError, match=r"^fixed_alpha\b"):
        CoordinatorConfig(alpha_method="fixed", fixed_alpha=value)


@pytest.mark.parametrize("value", [None, -0.1, math.nan, math.inf, "half", True])
def test_a_bad_kl_budget_names_its_field(value):
    with pytest.raises(ValueError, match=r"^kl_budget\b"):
        CoordinatorConfig(alpha_method="kl_budget", kl_budget=value)


def test_crossed_bounds_name_both_fields():
    with pytest.raises(ValueError, match=r"alpha_min \(0.7\).*alpha_max \(0.3\)"):
        CoordinatorConfig(alpha_min=0.7, alpha_max=0.3)


def test_adaptive_lists_need_the_tail():
    with pytest.raises(ValueError, match=r'top_k "auto".*support to "tail"'):
        CoordinatorConfig(top_k="auto")
    assert CoordinatorConfig(top_k="auto", support="tail").top_k == "auto"


@pytest.mark.parametrize(("values", "expected"), [({}, 64), ({"engine": "native"}, 256)])
def test_sequences_in_flight_depend_on_the_engine_unless_they_are_set(values, expected):
    assert CoordinatorConfig(**values).concurrency == expected
    assert CoordinatorConfig(**values, max_concurrency=3).concurrency == 3


def test_every_field_is_tested_for_bad_values():
    assert set(FIELDS) - set(INVALID) == set()


def test_every_field_has_a_help_text():
    assert all(field.metadata["help"].endswith(".") for field in FIELDS.values())


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("topk", "top_k"), ("alpha", "alpha_m"), ("suport", "support"), ("theta-url", "theta_url"), ("Seed", "seed")],
)
def test_an_unknown_key_names_the_nearest(key, nearest):
    with pytest.raises(ValueError, match=rf"unknown key '{key}'.*did you mean '{nearest}"):
        CoordinatorConfig.from_dict({key: 1})
    with pytest.raises(ValueError, match=rf"unknown key '{key}'.*did you mean '{nearest}"):
        CoordinatorConfig(**{key: 1})
    with pytest.raises(ValueError, match=rf"unknown key '{key}'.*did you mean '{nearest}"):
        dataclasses.replace(CoordinatorConfig(), **{key: 1})


def test_an_unknown_key_near_nothing():
    with pytest.raises(ValueError, match=r"unknown key 'zzzzzz' in CoordinatorConfig$"):
        CoordinatorConfig.from_dict({"zzzzzz": 1})


def test_from_dict_equals_the_constructor():
    values = {"top_k": 7, "support": "tail", "alpha_method": "fixed", "fixed_alpha": 0.25, "seed": 3}
    assert CoordinatorConfig.from_dict(values) == CoordinatorConfig(**values)


def test_the_config_takes_names_only():
    with pytest.raises(TypeError, match="positional"):
        CoordinatorConfig("http://a:1")


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CoordinatorConfig().top_k = 5


def test_survives_pickling():
    config = CoordinatorConfig(theta_url="http://a:1", top_k=7, temperature=0.5, tokenizer="x")
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(
    "url", ["http://host:8000", "http://host:8000/", "http://host:8000/v1", "http://host:8000/v1/"]
)
def test_urls_lose_slash_and_v1(url):
    config = CoordinatorConfig(theta_url=url, t_url=url)
    assert config.theta_url == config.t_url == "http://host:8000"


@pytest.mark.parametrize(
    "values", [{"alpha_min": 0, "alpha_max": 1}, {"temperature": 2}, {"seed": 0}, {"max_retries": 0}]
)
def test_whole_numbers_and_edges_are_fine(values):
    config = CoordinatorConfig(**values)
    assert {name: getattr(config, name) for name in values} == values
