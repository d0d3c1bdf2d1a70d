from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ads.config.generation import GenerationConfig
from megatron_ads.data.chat import ChatTokenizer
from megatron_ads.errors import DataError
from megatron_ads.inference.engine import Completion, Finish
from megatron_ads.journal import Journal
from megatron_ads.regress.harness_model import HarnessModel, Speaking
from tests.data.tokenizers import R1, model_tokenizer, tokenizer_in


class Scripted:
    """An engine whose answers are given, and which notes what it was asked."""

    def __init__(self, *said: Completion) -> None:
        self.said, self.asked, self.configs = list(said), list[Sequence[int]](), list[GenerationConfig]()

    def generate(self, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> list[list[Completion]]:
        self.asked += prompts
        self.configs.append(config)
        return [[self.said.pop(0)] for _ in prompts]

    def log_probabilities(self, prompts: Sequence[Any], answers: Sequence[Sequence[int]]) -> list[list[float]]:
        self.asked += prompts
        return [[-0.5] * len(answer) for answer in answers]


@pytest.fixture
def tokenizer(tmp_path: Path) -> ChatTokenizer:
    return tokenizer_in(tmp_path)


def harness(engine: Scripted, tokenizer: ChatTokenizer, journal: Journal, *, chat: bool = True) -> HarnessModel:
    how = Speaking(chat=chat, max_new_tokens=64, batch_size=4)
    return HarnessModel(engine, tokenizer, journal, how)  # type: ignore[arg-type]


def asked(*args: Any) -> Any:
    return SimpleNamespace(args=args)


@pytest.mark.parametrize(
    ("said", "finish", "answer", "finished"),
    [
        ("<think>6 x 7</think>The answer is 42.", Finish.ended, "The answer is 42.", True),
        ("The answer is 42.", Finish.ended, "The answer is 42.", True),
        ("<think>6 x 7 is 41, no", Finish.cut_off, "", False),
        ("<think>6 x 7</think>The answer", Finish.cut_off, "The answer", False),
    ],
)
def test_reasoning_is_left_out_and_what_did_not_end_is_counted(
    tokenizer: ChatTokenizer, tmp_path: Path, said: str, finish: Finish, answer: str, finished: bool
) -> None:
    with Journal(tmp_path / "journal") as journal:
        model = harness(Scripted(Completion(text=said, finish=finish)), tokenizer, journal)
        prompt = model.apply_chat_template([{"role": "user", "content": "How much is 6 x 7?"}])
        assert model.generate_until([asked(prompt, {"until": ["The"]})]) == [answer]
        assert (prompt in model.unfinished) == (not finished)


def test_questions_that_a_server_refuses_are_not_counted_as_wrong(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    refused = Completion(text="maximum context length is 512", finish=Finish.refused)
    with Journal(tmp_path / "journal") as journal:
        model = harness(Scripted(Completion(text="42"), refused), tokenizer, journal)
        prompts = [model.apply_chat_template([{"role": "user", "content": text}]) for text in ("6 x 7?", "6 x 8?")]
        with pytest.raises(DataError, match=r"refuses 1 of 2 questions \(maximum context length is 512\)"):
            model.generate_until([asked(prompt, {}) for prompt in prompts])


def test_reasoning_that_the_template_opens_is_left_out_too(tmp_path: Path) -> None:
    tokenizer = model_tokenizer(R1, tmp_path)
    with Journal(tmp_path / "journal") as journal:
        model = harness(Scripted(Completion(text="6 x 7</think>\n\n42"), Completion(text="6 x")), tokenizer, journal)
        prompts = [model.apply_chat_template([{"role": "user", "content": text}]) for text in ("6 x 7?", "And 6 x 8?")]
        assert model.generate_until([asked(prompt, {}) for prompt in prompts]) == ["\n\n42", ""]
        assert model.unfinished == {prompts[1]}


def test_a_text_is_continued_up_to_where_the_task_stops_it(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    engine = Scripted(Completion(text=" 42"), Completion(text=" 43"))
    with Journal(tmp_path / "journal") as journal:
        model = harness(engine, tokenizer, journal, chat=False)
        requests = [asked("6 x 7 =", {"until": ["Q:"]}), asked("6 x 7 = ", {"until": ["\n"]})]
        assert model.generate_until(requests) == [" 42", " 43"]
    assert [config.stop for config in engine.configs] == [["Q:"], ["\n"]]


def test_a_question_that_looks_like_a_control_token_is_words(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    end = tokenizer.fast.convert_ids_to_tokens(tokenizer.end_token_id)
    engine = Scripted(Completion(text="yes"))
    with Journal(tmp_path / "journal") as journal:
        model = harness(engine, tokenizer, journal)
        assert tokenizer.end_token_id not in model.tok_encode(f"Is {end} a token?")
        prompt = model.apply_chat_template([{"role": "user", "content": f"Is {end} a token?"}])
        prompt.encode()  # as lm-eval does
        model.generate_until([asked(prompt, {})])
    assert tokenizer.end_token_id not in engine.asked[0]


def test_a_continuation_is_scored_behind_what_the_tokenizer_puts_in_front(
    tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    engine = Scripted()
    with Journal(tmp_path / "journal") as journal:
        model = harness(engine, tokenizer, journal, chat=False)
        requests = [asked("Answer:", " A"), asked("Answer:", " B"), asked("Answer:", " A")]
        found = model.loglikelihood(requests)
        again = model.loglikelihood(requests)
    tokens = [len(tokenizer.encode(f"Answer:{letter}")) - len(tokenizer.encode("Answer:")) for letter in (" A", " B")]
    assert found == [(-0.5 * tokens[0], False), (-0.5 * tokens[1], False), (-0.5 * tokens[0], False)]
    assert again == found
    assert len(engine.asked) == 2  # what is the same is asked once, and what was answered not again
    begin = tokenizer.fast("").input_ids
    assert list(engine.asked[0][: len(begin)]) == begin
