from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_ads.data.ads_pairs import builtin_rows
from megatron_ads.data.demo_tokenizer import write_tokenizer
from megatron_ads.data.tokenizer import ChatTokenizer, load_tokenizer
from megatron_ads.errors import DataError
from megatron_ads.evaluation import answers as answering
from megatron_ads.evaluation.answers import Answer, answer_rows
from megatron_ads.evaluation.greedy import Completion

ROWS = builtin_rows(6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path, 1536)
    return path


class Parrot:
    """Stands in for the model: says what it was told to, and keeps the prompts."""

    def __init__(self, sayings: Sequence[list[int]]) -> None:
        self.sayings = sayings
        self.prompts: list[list[int]] = []

    def __call__(self, folder: Path, **_: Any) -> "Parrot":
        return self

    def complete(self, prompts: Sequence[list[int]], **_: Any) -> list[Completion]:
        self.prompts = list(prompts)
        return [Completion(tokens, ended=True) for tokens in self.sayings]


def _answers(
    folder: Path, texts: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Answer], Parrot, ChatTokenizer]:
    tokenizer = load_tokenizer(folder)
    parrot = Parrot([tokenizer.encode(text) for text in texts])
    monkeypatch.setattr(answering, "GreedyGenerator", parrot)
    return answer_rows(folder, ROWS, max_new_tokens=64, batch_size=8), parrot, tokenizer


def test_each_row_is_asked_without_its_target_and_has_its_answer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers, parrot, tokenizer = _answers(folder, [row.target for row in ROWS], monkeypatch)
    assert [answer.text for answer in answers] == [row.target for row in ROWS]
    for row, prompt in zip(ROWS, parrot.prompts, strict=True):
        text = tokenizer.fast.decode(prompt)
        assert text.endswith(row.messages[0].content + "<｜Assistant｜>")
        assert "<Label>" not in text  # the truth is not in the question


def test_reasoning_that_the_chat_template_opens_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "render_prompt", lambda *_: "question<｜Assistant｜><think>\n")
    answers, _, _ = _answers(folder, [row.target.removeprefix("<think>") for row in ROWS], monkeypatch)
    assert [answer.text for answer in answers] == [row.target for row in ROWS]


def test_no_rows_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"no held-out rows to answer; raise data\.validation_rows"):
        answer_rows(folder, [], max_new_tokens=8, batch_size=1)
