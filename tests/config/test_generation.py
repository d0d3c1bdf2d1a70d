import pytest

from megatron_ads.config.generation import GREEDY, LengthRule, Method, choose_decoding
from megatron_ads.errors import ConfigError


def test_without_options_each_method_has_its_defaults() -> None:
    assert choose_decoding(Method.greedy, temperature=None, beams=None) == GREEDY
    how = choose_decoding(Method.constrained_beam, temperature=None)
    assert (how.beams, how.length, how.collaborative) == (20, LengthRule.sum, 0.0)


def test_an_option_without_effect_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--temperature has no effect with --decode beam; .* --decode sampled"):
        choose_decoding(Method.beam, temperature=0.5)
    with pytest.raises(ConfigError, match=r"--top-p has no effect with --decode greedy"):
        choose_decoding(Method.greedy, top_p=0.5)
    with pytest.raises(ConfigError, match=r"--beams .* --decode beam or constrained-beam"):
        choose_decoding(Method.sampled, beams=4)


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [
        (Method.sampled, "temperature", 0.0),
        (Method.sampled, "temperature", float("nan")),
        (Method.sampled, "top_p", 1.1),
        (Method.sampled, "top_p", 0.0),
        (Method.beam, "beams", 0),
        (Method.constrained_beam, "collaborative", -0.1),
    ],
)
def test_an_impossible_value_is_refused_with_the_value(method: Method, name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"--{name.replace('_', '-')} is {value}; it must be"):
        choose_decoding(method, **{name: value})
