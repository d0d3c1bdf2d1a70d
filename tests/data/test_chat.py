"""Conversations in tokens: what the model reads, and on which tokens there is loss."""

from pathlib import Path

import pytest

from megatron_ads.data.chat import ChatTokenizer, load_tokenizer, split_text, tokenize_row
from megatron_ads.data.demo_tokenizer import CHAT_TEMPLATE, END, train_tokenizer
from megatron_ads.errors import DataError
from megatron_ads.rows import ChatRow, Message, Role
from tests.data.tokenizers import tokenizer_in

ROW = ChatRow(
    "r1",
    "test",
    (Message(Role.user, "Is it?"), Message(Role.assistant, "<think>Yes.</think><Label>Good</Label>")),
    weight=0.5,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return tokenizer_in(tmp_path_factory.mktemp("tokenizer"))


def test_loss_is_on_the_target_and_its_end_token_only(tokenizer: ChatTokenizer):
    row = tokenize_row(ROW, tokenizer)
    has_loss = row.loss_weights > 0
    with_loss = tokenizer.fast.decode(row.tokens[has_loss], skip_special_tokens=False)
    without = tokenizer.fast.decode(row.tokens[~has_loss], skip_special_tokens=False)
    assert with_loss == f"<think>Yes.</think><Label>Good</Label>{END}"
    assert without == "<｜begin▁of▁sentence｜><｜User｜>Is it?<｜Assistant｜>"
    assert set(row.loss_weights[has_loss].tolist()) == {0.5}


def test_reasoning_survives_although_the_template_drops_it(tokenizer: ChatTokenizer):
    rendered = tokenizer.fast.apply_chat_template([m.as_dict() for m in ROW.messages], tokenize=False)
    assert "Yes." not in rendered  # the template alone would lose it
    assert "Yes." in split_text(ROW, tokenizer)[1]


def test_reasoning_of_earlier_answers_is_left_to_the_template(tokenizer: ChatTokenizer):
    earlier = (Message(Role.user, "First?"), Message(Role.assistant, "<think>Old.</think>One."))
    prompt, target = split_text(ChatRow("r", "test", (*earlier, *ROW.messages)), tokenizer)
    assert "One." in prompt and "Old." not in prompt
    assert target == ROW.target


def test_a_system_message_is_rendered(tokenizer: ChatTokenizer):
    prompt, _ = split_text(ChatRow("r", "test", (Message(Role.system, "Be brief."), *ROW.messages)), tokenizer)
    assert prompt == "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Is it?<｜Assistant｜>"


def test_prompt_tokens_are_those_of_generation(tokenizer: ChatTokenizer):
    # What a server does: render up to the assistant, encode, generate.
    served = tokenizer.fast.apply_chat_template(
        [ROW.messages[0].as_dict()], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    row = tokenize_row(ROW, tokenizer)
    assert row.tokens[row.loss_weights == 0].tolist() == served


def test_a_template_that_opens_the_reasoning_does_not_get_it_twice(tmp_path: Path):
    opening = CHAT_TEMPLATE.replace("{{ '<｜Assistant｜>' }}", "{{ '<｜Assistant｜><think>\\n' }}")
    prompt, target = split_text(ROW, tokenizer_in(tmp_path, chat_template=opening))
    assert prompt.endswith("<｜Assistant｜><think>\n")
    assert target == "Yes.</think><Label>Good</Label>"


def test_without_a_template_messages_are_paragraphs(tmp_path: Path):
    tokenizer = tokenizer_in(tmp_path, chat_template=None)
    assert not tokenizer.fast.chat_template
    assert split_text(ROW, tokenizer) == ("user: Is it?\n\nassistant: ", ROW.target)


def test_a_template_that_refuses_is_reported_with_the_row(tmp_path: Path):
    refusing = "{{ raise_exception('no system messages here') }}"
    with pytest.raises(DataError, match=r"Row 'r1': .*refuses the conversation: no system messages here"):
        split_text(ROW, tokenizer_in(tmp_path, chat_template=refusing))


def test_decoding_keeps_reasoning_tags_and_drops_control_tokens(tokenizer: ChatTokenizer):
    row = tokenize_row(ROW, tokenizer)
    text = tokenizer.decode(row.tokens[row.loss_weights > 0].tolist())
    assert text == "<think>Yes.</think><Label>Good</Label>"


def test_any_text_survives_encoding(tokenizer: ChatTokenizer):
    text = "Größe 42, 東京 🎉 \t  two  spaces\nand\r\nlines"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_gives_the_same_tokenizer_every_time(tmp_path: Path):
    for name in "ab":
        (tmp_path / name).mkdir()
        train_tokenizer.cache_clear()
        tokenizer_in(tmp_path / name)
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()


def test_a_folder_without_a_tokenizer_says_what_to_copy(tmp_path: Path):
    with pytest.raises(DataError, match=r"holds no tokenizer\.json\. Copy it"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match=r"absent does not exist\. Give a checkpoint folder"):
        load_tokenizer(tmp_path / "absent")


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="names no eos_token"):
        tokenizer_in(tmp_path, eos_token=None)
