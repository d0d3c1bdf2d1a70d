import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3ForCausalLM

from megatron_ads.config.generation import Decoding, Method
from megatron_ads.errors import ConversionError
from megatron_ads.inference.language_model import left_padded
from megatron_ads.inference.transformers_engine import Generator

PAD = 0
PROMPTS = ([5, 6, 7], [9], [3, 1, 4, 1, 5], [8, 8])


def _one_by_one(folder: Path, prompt: list[int], new_tokens: int) -> list[int]:
    """Greedy decoding without batch, padding or cache: the whole sequence again for every token."""
    model = DeepseekV3ForCausalLM.from_pretrained(folder).eval()
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(new_tokens):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_batched_generation_equals_one_by_one(random_model: Path) -> None:
    generator = Generator(random_model, end_token=31, pad_token=PAD)
    for prompt, completion in zip(PROMPTS, generator.complete(PROMPTS, max_new_tokens=6), strict=True):
        expected = _one_by_one(random_model, list(prompt), 6)
        assert completion.tokens == (expected[: expected.index(31)] if 31 in expected else expected)


def test_generation_stops_at_the_end_token(random_model: Path) -> None:
    first, second, third, *_ = _one_by_one(random_model, [5, 6, 7], 3)
    assert third not in (first, second)  # or this prompt could not show where it stops
    generator = Generator(random_model, end_token=third, pad_token=PAD)
    (stopped,) = generator.complete([[5, 6, 7]], max_new_tokens=6)
    assert (stopped.tokens, stopped.ended) == ([first, second], True)
    (cut_off,) = generator.complete([[5, 6, 7]], max_new_tokens=2)
    assert (cut_off.tokens, cut_off.ended) == ([first, second], False)


def _first_token_shares(folder: Path, how: Decoding, draws: int) -> dict[int, float]:
    generator = Generator(folder, end_token=31, pad_token=PAD)
    drawn = generator.complete([[5, 6, 7]] * draws, max_new_tokens=1, how=how, draw=7)
    counts = Counter(completion.tokens[0] if completion.tokens else 31 for completion in drawn)
    return {token: count / draws for token, count in counts.items()}


def test_samples_come_with_the_models_probabilities_at_the_temperature(random_model: Path) -> None:
    model = DeepseekV3ForCausalLM.from_pretrained(random_model).eval()
    with torch.inference_mode():
        expected = (model(torch.tensor([[5, 6, 7]])).logits[0, -1] / 0.5).softmax(-1)
    draws = 2000
    shares = _first_token_shares(random_model, Decoding(method=Method.sampled, temperature=0.5), draws)
    for token, probability in enumerate(expected.tolist()):
        deviation = math.sqrt(probability * (1 - probability) / draws)
        assert shares.get(token, 0.0) == pytest.approx(probability, abs=5 * deviation + 1e-3)


def test_top_p_draws_from_the_fewest_tokens_that_hold_it(random_model: Path) -> None:
    model = DeepseekV3ForCausalLM.from_pretrained(random_model).eval()
    with torch.inference_mode():
        ordered, tokens = model(torch.tensor([[5, 6, 7]])).logits[0, -1].softmax(-1).sort(descending=True)
    needed = int((ordered.cumsum(0) < 0.5).sum()) + 1
    assert 1 < needed < 20  # or nothing could be left out, or chosen from
    shares = _first_token_shares(random_model, Decoding(method=Method.sampled, top_p=0.5), 1000)
    assert set(shares) == set(tokens[:needed].tolist())


def test_a_draw_is_repeated_by_its_number_and_leaves_the_callers_random_state_alone(random_model: Path) -> None:
    generator = Generator(random_model, end_token=31, pad_token=PAD)
    how = Decoding(method=Method.sampled)
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    first, again, other = (generator.complete(PROMPTS, max_new_tokens=8, how=how, draw=draw) for draw in (1, 1, 2))
    assert torch.equal(torch.rand(2), expected)
    assert first == again != other


def test_what_a_checkpoint_says_of_sampling_plays_no_part(random_model: Path, tmp_path: Path) -> None:
    for file in random_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    wishes = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 5.0, "eos_token_id": 4}
    (tmp_path / "generation_config.json").write_text(json.dumps(wishes))
    wished, plain = (Generator(folder, end_token=31, pad_token=PAD) for folder in (tmp_path, random_model))
    assert wished.complete(PROMPTS, max_new_tokens=8) == plain.complete(PROMPTS, max_new_tokens=8)


def test_padding_is_on_the_left_and_masked() -> None:
    tokens_BS, mask_BS = left_padded([[7], [8, 9]], PAD)
    assert tokens_BS.tolist() == [[PAD, 7], [8, 9]]
    assert mask_BS.tolist() == [[0, 1], [1, 1]]


def test_a_folder_that_is_no_checkpoint_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="transformers cannot load"):
        Generator(tmp_path, end_token=1, pad_token=0)


def test_weights_that_are_missing_are_not_made_up(random_model: Path, tmp_path: Path) -> None:
    weights = load_file(random_model / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((random_model / "config.json").read_text())
    with pytest.raises(ConversionError, match=r"lacks 1 weights .* model\.norm\.weight"):
        Generator(tmp_path, end_token=1, pad_token=0)
