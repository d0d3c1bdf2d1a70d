import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3ForCausalLM

from megatron_ads.config.generation import GenerationConfig, Method
from megatron_ads.errors import ConfigError, ConversionError
from megatron_ads.inference.beam_rules import AnyToken, ValidNames, build_trie
from megatron_ads.inference.engine import Finish
from megatron_ads.inference.language_model import left_padded, load_model
from megatron_ads.inference.transformers_engine import TransformersEngine, open_engine
from megatron_ads.rows import Message, Role
from tests.inference.tiny_model import write_tiny_model

END, PAD = 31, 0
PROMPTS = ([5, 6, 7], [9], [3, 1, 4, 1, 5], [8, 8])


def _engine(folder: Path, end_token: int = END) -> TransformersEngine:
    return TransformersEngine(load_model(folder), end_token=end_token, pad_token=PAD)


def _limit(tokens: int) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=tokens)


def _one_by_one(folder: Path, prompt: list[int], new_tokens: int) -> list[int]:
    """Greedy decoding without batch, padding or cache: the whole sequence again for every token."""
    model = DeepseekV3ForCausalLM.from_pretrained(folder).eval()
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(new_tokens):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_batched_generation_equals_one_by_one(random_model: Path) -> None:
    engine = _engine(random_model)
    for prompt, (completion,) in zip(PROMPTS, engine.generate(PROMPTS, _limit(6)), strict=True):
        expected = _one_by_one(random_model, list(prompt), 6)
        assert completion.token_ids == tuple(expected[: expected.index(END) + 1] if END in expected else expected)


def test_generation_stops_at_the_end_token(random_model: Path) -> None:
    first, second, third, *_ = _one_by_one(random_model, [5, 6, 7], 3)
    assert third not in (first, second)  # or this prompt could not show where it stops
    engine = _engine(random_model, end_token=third)
    ((stopped,),) = engine.generate([[5, 6, 7]], _limit(6))
    assert (stopped.token_ids, stopped.finish) == ((first, second, third), Finish.ended)
    ((cut_off,),) = engine.generate([[5, 6, 7]], _limit(2))
    assert (cut_off.token_ids, cut_off.finish) == ((first, second), Finish.cut_off)
    assert (cut_off.prompt_tokens, cut_off.answer_tokens) == (3, 2)


LOG_PROBABILITIES = 1e-4
"""FP32, with and without cache and padding: rounding, about 1e-6 here."""


@pytest.mark.parametrize("method", [Method.greedy, Method.sampled, Method.beam])
def test_log_probabilities_of_what_was_generated_are_those_of_a_forward_pass_over_it(
    random_model: Path, method: Method
) -> None:
    engine = _engine(random_model)
    sampled = {"temperature": 0.7, "top_p": 0.9, "samples": 3} if method is Method.sampled else {}
    config = GenerationConfig(method=method, max_new_tokens=6, beams=3, log_probabilities=True, **sampled)
    model = DeepseekV3ForCausalLM.from_pretrained(random_model).eval()
    for prompt, completions in zip(PROMPTS, engine.generate(PROMPTS, config), strict=True):
        assert len(completions) == (1 if method is Method.greedy else 3)
        (known,) = engine.log_probabilities([prompt], [completions[0].token_ids or ()])
        assert completions[0].log_probabilities == pytest.approx(known, abs=LOG_PROBABILITIES)
        for one in completions:
            tokens = list(one.token_ids or ())
            with torch.inference_mode():  # at temperature 1, whatever was sampled at
                log_SV = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 :].log_softmax(-1)
            expected = [float(log_SV[step, token]) for step, token in enumerate(tokens)]
            assert one.log_probabilities == pytest.approx(expected, abs=LOG_PROBABILITIES)


def test_a_prompt_is_read_once_for_all_its_samples(random_model: Path) -> None:
    engine, read = _engine(random_model), list[tuple[int, ...]]()
    engine._model.model.embed_tokens.register_forward_hook(lambda _, tokens, __: read.append(tuple(tokens[0].shape)))
    engine.generate(PROMPTS, GenerationConfig(method=Method.sampled, samples=4, max_new_tokens=2))
    assert read[0] == (len(PROMPTS), max(map(len, PROMPTS)))
    assert read[1][0] > len(PROMPTS) and read[1][1] == 1


def test_they_are_left_out_where_nobody_asks(random_model: Path) -> None:
    ((completion,),) = _engine(random_model).generate([[5]], _limit(2))
    assert completion.log_probabilities is None


def test_constrained_beams_need_rules(random_model: Path) -> None:
    with pytest.raises(ConfigError, match="constrained-beam needs rules"):
        _engine(random_model).generate([[5]], GenerationConfig(method=Method.constrained_beam, max_new_tokens=1))


def _first_token_shares(folder: Path, how: GenerationConfig, draws: int) -> dict[int, float]:
    how = replace(how, samples=draws, seed=7, max_new_tokens=1)
    (drawn,) = _engine(folder).generate([[5, 6, 7]], how)
    counts = Counter((completion.token_ids or ())[0] for completion in drawn)
    return {token: count / draws for token, count in counts.items()}


def test_samples_come_with_the_models_probabilities_at_the_temperature(random_model: Path) -> None:
    model = DeepseekV3ForCausalLM.from_pretrained(random_model).eval()
    with torch.inference_mode():
        expected = (model(torch.tensor([[5, 6, 7]])).logits[0, -1] / 0.5).softmax(-1)
    draws = 2000
    shares = _first_token_shares(random_model, GenerationConfig(method=Method.sampled, temperature=0.5), draws)
    for token, probability in enumerate(expected.tolist()):
        deviation = math.sqrt(probability * (1 - probability) / draws)
        assert shares.get(token, 0.0) == pytest.approx(probability, abs=5 * deviation + 1e-3)


def test_top_p_draws_from_the_fewest_tokens_that_hold_it(random_model: Path) -> None:
    model = DeepseekV3ForCausalLM.from_pretrained(random_model).eval()
    with torch.inference_mode():
        ordered, tokens = model(torch.tensor([[5, 6, 7]])).logits[0, -1].softmax(-1).sort(descending=True)
    needed = int((ordered.cumsum(0) < 0.5).sum()) + 1
    assert 1 < needed < 20  # or nothing could be left out, or chosen from
    shares = _first_token_shares(random_model, GenerationConfig(method=Method.sampled, top_p=0.5), 1000)
    assert set(shares) == set(tokens[:needed].tolist())


NAMES = build_trie({"ab": [5, 6], "abc": [5, 6, 7], "b": [9], "cd": [20, 21]}, END)
FIRST = [5, 9, 20]


def test_by_rules_only_valid_names_are_drawn_as_often_as_the_model_says_among_them(random_model: Path) -> None:
    engine, draws = _engine(random_model), 2000
    how = GenerationConfig(method=Method.sampled, samples=draws, seed=7, max_new_tokens=4, log_probabilities=True)
    free, named = engine.generate([[3, 1], [5, 6, 7]], how, rules=[AnyToken(1), ValidNames(NAMES)])
    assert len({one.token_ids for one in free}) > 100  # the rules of one row are not those of another
    assert {NAMES.name_of(one.token_ids or ()) for one in named} == set(NAMES.names)
    assert all(one.finish is Finish.ended for one in named)
    model = DeepseekV3ForCausalLM.from_pretrained(random_model).eval()
    with torch.inference_mode():
        expected = model(torch.tensor([[5, 6, 7]])).logits[0, -1, FIRST].softmax(-1).tolist()
    drawn = Counter((one.token_ids or ())[0] for one in named)
    for token, probability in zip(FIRST, expected, strict=True):
        deviation = math.sqrt(probability * (1 - probability) / draws)
        assert drawn[token] / draws == pytest.approx(probability, abs=5 * deviation + 1e-3)
    for one in {one.token_ids: one for one in named}.values():  # over all tokens, not among the valid ones
        (known,) = engine.log_probabilities([[5, 6, 7]], [one.token_ids or ()])
        assert one.log_probabilities == pytest.approx(known, abs=LOG_PROBABILITIES)


def test_by_rules_greedy_decoding_takes_the_most_probable_valid_token_each_time(random_model: Path) -> None:
    engine = _engine(random_model)
    model = DeepseekV3ForCausalLM.from_pretrained(random_model).eval()
    prompts = [[5, 6, 7], [9], [8, 8]]
    for prompt, (one,) in zip(prompts, engine.generate(prompts, _limit(4), rules=[ValidNames(NAMES)] * 3), strict=True):
        tokens, node = list[int](), NAMES.root
        while node.children:
            with torch.inference_mode():
                logits_C = model(torch.tensor([[*prompt, *tokens]])).logits[0, -1, node.tokens_C]
            tokens.append(int(node.tokens_C[int(logits_C.argmax())]))
            node = node.child(tokens[-1])
        assert one.token_ids == tuple(tokens)


def test_a_draw_is_repeated_by_its_seed_and_leaves_the_callers_random_state_alone(random_model: Path) -> None:
    engine = _engine(random_model)
    how = GenerationConfig(method=Method.sampled, max_new_tokens=8)
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    first, again, other = (engine.generate(PROMPTS, replace(how, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(2), expected)
    assert first == again != other


def test_what_a_checkpoint_says_of_sampling_plays_no_part(random_model: Path, tmp_path: Path) -> None:
    for file in random_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    wishes = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 5.0, "eos_token_id": 4}
    (tmp_path / "generation_config.json").write_text(json.dumps(wishes))
    wished, plain = (_engine(folder) for folder in (tmp_path, random_model))
    assert wished.generate(PROMPTS, _limit(8)) == plain.generate(PROMPTS, _limit(8))


def test_nothing_to_read_or_to_continue_is_no_error(random_model: Path) -> None:
    engine = _engine(random_model)
    assert engine.log_probabilities([], []) == engine.generate([], _limit(8)) == []


def test_padding_is_on_the_left_and_masked() -> None:
    tokens_BS, mask_BS = left_padded([[7], [8, 9]], PAD)
    assert tokens_BS.tolist() == [[PAD, 7], [8, 9]]
    assert mask_BS.tolist() == [[0, 1], [1, 1]]


def test_a_folder_that_is_no_checkpoint_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="transformers cannot load"):
        _engine(tmp_path)


@pytest.mark.parametrize("setting", [{"eos_token_id": [1, "x"]}, {"dtype": "float99"}, {"rope_theta": "1e4"}])
def test_whatever_transformers_raises_for_an_odd_setting_is_a_clear_error(
    random_model: Path, tmp_path: Path, setting: dict[str, Any]
) -> None:
    config = json.loads((random_model / "config.json").read_text()) | setting
    config.pop("rope_parameters", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(random_model / "model.safetensors")
    with pytest.raises(ConversionError, match="transformers cannot load"):
        load_model(tmp_path)


def test_weights_that_are_missing_are_not_made_up(random_model: Path, tmp_path: Path) -> None:
    weights = load_file(random_model / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((random_model / "config.json").read_text())
    with pytest.raises(ConversionError, match=r"lacks 1 weights .* model\.norm\.weight"):
        _engine(tmp_path)


def test_a_completion_ends_in_front_of_a_text_to_stop_at(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path)
    engine = open_engine(folder)
    prompt = engine.tokens_of([Message(Role.user, "a question")])
    ((whole,),) = engine.generate([prompt], _limit(24))
    assert whole.finish is Finish.cut_off
    stop = whole.text[len(whole.text) // 2 :][:3]
    assert len(stop) == 3
    stopped_at = GenerationConfig(max_new_tokens=24, stop=["never written", stop])
    ((stopped,),) = engine.generate([prompt], stopped_at)
    assert (stopped.text, stopped.finish) == (whole.text[: whole.text.index(stop)], Finish.ended)
    assert stopped.answer_tokens < whole.answer_tokens


def test_a_text_that_answers_share_is_read_once(random_model: Path) -> None:
    engine, read = _engine(random_model), list[tuple[int, ...]]()
    alone = [engine.log_probabilities([prompt], [answer])[0] for prompt, answer in CHOICES]
    engine._model.register_forward_pre_hook(lambda _, args: read.append(tuple(args[0].shape)))
    together = engine.log_probabilities([prompt for prompt, _ in CHOICES], [answer for _, answer in CHOICES])
    for one, other in zip(together, alone, strict=True):
        assert one == pytest.approx(other, abs=LOG_PROBABILITIES)
    assert read == [(3, 4)], "three letters behind one prompt, and two other texts; no last token"


CHOICES = [([5, 6, 7], [1]), ([5, 6, 7], [2]), ([5, 6, 7], [3]), ([5, 6, 7], [4, 2]), ([9], [8, 1])]
