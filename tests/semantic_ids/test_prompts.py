"""A model with grown tokens reads and writes a semantic ID as one token a code, wherever the text comes from."""

import pytest

from megatron_ads.data.chat import ChatTokenizer, load_tokenizer, tokenize_row
from megatron_ads.inference.name_answers import NameForms
from megatron_ads.rows import ChatRow, Message, Role
from parity_tests.harness.growing import WORDS, grow, write_tokenizer
from tests.models.checkpoints import V3, write_checkpoint


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    place = tmp_path_factory.mktemp("prompts")
    grow(write_tokenizer(write_checkpoint(place / "v3", V3)), place / "grown", tokens=20)
    return load_tokenizer(place / "grown")


def test_ids_in_prompts_and_targets_are_their_tokens_and_control_text_stays_text(tokenizer: ChatTokenizer) -> None:
    prompt = Message(Role.user, "w3 <sid_0_4><sid_0_7> w5 <end>")
    row = ChatRow("r", "own", (prompt, Message(Role.assistant, "<sid_0_2>w6")))
    tokens = tokenize_row(row, tokenizer).tokens.tolist()
    asked = tokens[tokens.index(3) : tokens.index(5) + 1]
    assert asked == [3, WORDS + 4, WORDS + 7, 5]
    end = tokenizer.end_token_id
    assert tokens[-3:] == [WORDS + 2, 6, end]
    assert tokens.count(end) == 1  # what the user wrote ends nothing


def test_beams_write_an_id_code_by_code(tokenizer: ChatTokenizer) -> None:
    names = ("<sid_0_1><sid_0_9>", "<sid_0_1><sid_0_8>", "<sid_0_3><sid_0_8><sid_0_11>")
    trie = NameForms(tokenizer).trie(names, "")
    assert trie.root.tokens_C.tolist() == [WORDS + 1, WORDS + 3]
    assert trie.root.child(WORDS + 1).tokens_C.tolist() == [WORDS + 8, WORDS + 9]
    assert trie.name_of([WORDS + 3, WORDS + 8, WORDS + 11, tokenizer.end_token_id]) == names[2]
