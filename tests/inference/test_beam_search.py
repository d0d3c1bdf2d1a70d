"""Beams against brute force: every name's log-probability by a forward pass over the whole sequence."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV3ForCausalLM

from megatron_ads.config.generation import GenerationConfig, LengthRule, Method
from megatron_ads.inference.beam_rules import NameTrie, ValidNames, build_trie
from megatron_ads.inference.beam_search import RowSearch
from megatron_ads.inference.engine import Completion, Finish
from megatron_ads.inference.language_model import load_model
from megatron_ads.inference.transformers_engine import TransformersEngine

END, PAD = 31, 0
PROMPTS = ([5, 6, 7], [9], [3, 1, 4, 1, 5])
NAMES = {
    "a": [4], "ab": [4, 9], "abc": [4, 9, 12], "b": [7, 7], "c": [11, 2, 30, 8], "cd": [11, 2, 30, 6],
    "e": [19], "f": [20, 4], "g": [20, 5, 6], "h": [25, 26, 27, 28, 29], "i": [1, 1], "j": [2],
}  # fmt: skip
CLOSE = 1e-4
"""Log-probabilities with and without cache and padding, in FP32, differ by rounding: up to about 1e-6 here."""


@pytest.fixture(scope="module")
def engine(random_model: Path) -> TransformersEngine:
    return TransformersEngine(load_model(random_model), end_token=END, pad_token=PAD)


@pytest.fixture(scope="module")
def model(random_model: Path) -> DeepseekV3ForCausalLM:
    return DeepseekV3ForCausalLM.from_pretrained(random_model).eval()


def _log_probabilities(model: DeepseekV3ForCausalLM, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
    """Return the log-probability of each token of ``answer``, the end token too: teacher forcing, without cache."""
    with torch.inference_mode():
        log_SV = model(torch.tensor([[*prompt, *answer, END]])).logits[0].log_softmax(-1)
    return [float(log_SV[len(prompt) - 1 + step, token]) for step, token in enumerate([*answer, END])]


def _search(
    engine: TransformersEngine, trie: NameTrie, beams: int, length: LengthRule = LengthRule.sum
) -> list[list[Completion]]:
    how = GenerationConfig(method=Method.constrained_beam, beams=beams, length=length, max_new_tokens=trie.depth)
    return engine.generate(PROMPTS, how, rules=[ValidNames(trie)] * len(PROMPTS))


def _name(trie: NameTrie, found: Completion) -> str:
    return trie.name_of(found.token_ids or ())


def _tokens(found: Completion) -> list[int]:
    """Return the tokens without the end token."""
    return [token for token in found.token_ids or () if token != END]


def _choices(name: str) -> int:
    """Return how many tokens of a name had an alternative, counted over all names."""
    tokens = [*NAMES[name], END]
    return sum(
        len({tuple([*other, END][: step + 1]) for other in NAMES.values() if other[:step] == tokens[:step]}) > 1
        for step in range(len(tokens))
    )


@pytest.mark.parametrize("length", list(LengthRule))
def test_as_many_beams_as_names_are_all_names_in_their_exact_order(
    engine: TransformersEngine, model: DeepseekV3ForCausalLM, length: LengthRule
) -> None:
    trie = build_trie(NAMES, END)
    for prompt, found in zip(PROMPTS, _search(engine, trie, len(NAMES), length), strict=True):
        exact = {name: sum(_log_probabilities(model, prompt, tokens)) for name, tokens in NAMES.items()}
        divisor = {
            LengthRule.sum: dict.fromkeys(NAMES, 1),
            LengthRule.mean: {name: len(tokens) + 1 for name, tokens in NAMES.items()},
            LengthRule.mean_of_choices: {name: _choices(name) for name in NAMES},
        }[length]
        expected = sorted(NAMES, key=lambda name: -exact[name] / divisor[name])
        assert [_name(trie, beam) for beam in found] == expected
        for name, beam in zip(expected, found, strict=True):
            assert _tokens(beam) == NAMES[name]
            assert beam.log_probability == pytest.approx(exact[name], abs=CLOSE)
            assert beam.score == pytest.approx(exact[name] / divisor[name], abs=CLOSE)


def test_the_rules_of_length_order_these_names_differently(engine: TransformersEngine) -> None:
    trie = build_trie(NAMES, END)
    orders = {
        length: tuple(beam.token_ids for beam in _search(engine, trie, len(NAMES), length)[0]) for length in LengthRule
    }
    assert len(set(orders.values())) == 3  # or the test before could not tell them apart


@pytest.mark.parametrize("beams", [1, 3, 5, 11])
def test_fewer_beams_are_valid_distinct_and_exactly_scored(
    engine: TransformersEngine, model: DeepseekV3ForCausalLM, beams: int
) -> None:
    trie = build_trie(NAMES, END)
    for prompt, found in zip(PROMPTS, _search(engine, trie, beams), strict=True):
        names = [_name(trie, beam) for beam in found]
        assert len(set(names)) == beams
        assert [_tokens(beam) for beam in found] == [NAMES[name] for name in names]
        exact = [sum(_log_probabilities(model, prompt, NAMES[name])) for name in names]
        assert [beam.log_probability for beam in found] == pytest.approx(exact, abs=CLOSE)
        assert exact == sorted(exact, reverse=True)


def test_more_beams_than_names_give_every_name_once(engine: TransformersEngine) -> None:
    trie = build_trie(NAMES, END)
    for found in _search(engine, trie, 50):
        assert sorted(_name(trie, beam) for beam in found) == sorted(NAMES)


def test_each_row_may_have_names_of_its_own(engine: TransformersEngine) -> None:
    tries = [build_trie({name: NAMES[name]}, END) for name in ("a", "cd", "h")]
    how = GenerationConfig(method=Method.constrained_beam, beams=4, max_new_tokens=9)
    found = engine.generate(PROMPTS, how, rules=[ValidNames(trie) for trie in tries])
    assert [[_tokens(beam) for beam in beams] for beams in found] == [[NAMES["a"]], [NAMES["cd"]], [NAMES["h"]]]


def test_a_collaborative_model_counts_by_its_share(engine: TransformersEngine, model: DeepseekV3ForCausalLM) -> None:
    trie = build_trie(NAMES, END)
    draw = torch.Generator().manual_seed(1)
    chances = torch.rand(len(NAMES), generator=draw, dtype=torch.float64).softmax(0).tolist()
    how = GenerationConfig(method=Method.constrained_beam, beams=len(NAMES), max_new_tokens=trie.depth)
    rules = [ValidNames(trie, chances=chances, collaborative=0.3)]
    (found,) = engine.generate(PROMPTS[:1], how, rules=rules)
    exact = {name: sum(_log_probabilities(model, PROMPTS[0], NAMES[name])) for name in NAMES}
    mixed = {name: 0.7 * exact[name] + 0.3 * math.log(chances[number]) for number, name in enumerate(trie.names)}
    assert [_name(trie, beam) for beam in found] == sorted(NAMES, key=lambda name: -mixed[name])
    for beam in found:
        name = _name(trie, beam)
        assert beam.score == pytest.approx(mixed[name], abs=CLOSE)
        assert beam.log_probability == pytest.approx(exact[name], abs=CLOSE)


def test_free_beams_find_the_best_of_all_short_answers(
    engine: TransformersEngine, model: DeepseekV3ForCausalLM
) -> None:
    # Enough beams that nothing is pruned: every answer of at most one token, and the end.
    prompt = PROMPTS[0]
    answers = [(), *itertools.product(range(31))]
    exact = {answer: sum(_log_probabilities(model, prompt, answer)) for answer in answers}
    how = GenerationConfig(method=Method.beam, beams=31, max_new_tokens=1)
    (found,) = engine.generate([prompt], how)
    expected = sorted(answers, key=lambda answer: -exact[answer])
    assert all(beam.finish is Finish.ended for beam in found)
    assert [tuple(_tokens(beam)) for beam in found] == expected[:31]


def test_free_beams_that_do_not_end_are_cut_off_and_come_last(engine: TransformersEngine) -> None:
    how = GenerationConfig(method=Method.beam, beams=4, max_new_tokens=3)
    (found,) = engine.generate([PROMPTS[0]], how)
    assert len(found) == 4
    ended = [beam.finish is Finish.ended for beam in found]
    assert ended == sorted(ended, reverse=True)
    assert all(len(_tokens(beam)) == 4 for beam in found if beam.finish is not Finish.ended)


def test_a_row_is_done_as_soon_as_no_running_beam_can_win() -> None:
    # "x" and "xa" are nearly sure; both have ended when "y" has two of its three tokens.
    trie = build_trie({"x": [1], "xa": [1, 7], "y": [2, 3, 4]}, END)
    search = RowSearch(ValidNames(trie), beams=2, limit=4, end_token=END, length=LengthRule.sum)
    likely_V = torch.full((32,), -20.0)
    likely_V[[1, 7, END]] = -0.01
    assert search.advance(likely_V[None]) == [0, 0]  # x.., y..
    assert search.advance(likely_V[None].expand(2, -1)) == [0, 1]  # x ended; xa.., y..
    assert search.advance(likely_V[None].expand(2, -1)) == []  # xa ended
    assert [beam.tokens for beam in search.best] == [(1,), (1, 7)]
    assert [beam.score for beam in search.best] == pytest.approx([-0.02, -0.03])
