import pytest

from megatron_ads.config.generation import GenerationConfig, LengthRule, Method
from megatron_ads.errors import ConfigError


def test_the_defaults_of_every_method_are_possible() -> None:
    for method in Method:
        GenerationConfig(method=method).check()


@pytest.mark.parametrize(
    ("method", "name", "value", "allowed"),
    [
        (Method.beam, "temperature", 0.5, "sampled"),
        (Method.greedy, "top_p", 0.5, "sampled"),
        (Method.greedy, "samples", 2, "sampled"),
        (Method.sampled, "beams", 4, "beam or generation.method constrained-beam"),
        (Method.sampled, "length", LengthRule.mean, "beam or generation.method constrained-beam"),
        (Method.beam, "collaborative", 0.5, "constrained-beam"),
    ],
)
def test_a_setting_without_effect_is_refused(method: Method, name: str, value: float, allowed: str) -> None:
    with pytest.raises(ConfigError) as refused:
        GenerationConfig(method=method, **{name: value}).check()
    assert str(refused.value).startswith(f"generation.{name} has no effect with generation.method {method}; leave it")
    for method_name in allowed.split(" or generation.method "):
        assert method_name in str(refused.value)


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [
        (Method.sampled, "temperature", 0.0),
        (Method.sampled, "temperature", float("nan")),
        (Method.sampled, "top_p", 1.1),
        (Method.sampled, "top_p", 0.0),
        (Method.sampled, "samples", 0),
        (Method.beam, "beams", 0),
        (Method.constrained_beam, "collaborative", -0.1),
        (Method.greedy, "max_new_tokens", 0),
    ],
)
def test_an_impossible_value_is_refused_with_the_value(method: Method, name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^rollout\.{name} is {value}; it must be"):
        GenerationConfig(method=method, **{name: value}).check("rollout")
