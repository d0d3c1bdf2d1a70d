"""``rollout.valid_names``: which rows are answered with which tokens, and what is refused."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from megatron_ads.config.generation import GenerationConfig
from megatron_ads.data.ads_pairs import builtin_rows
from megatron_ads.data.chat import ChatTokenizer, load_tokenizer
from megatron_ads.data.demo_tokenizer import write_tokenizer
from megatron_ads.errors import ConfigError, DataError
from megatron_ads.inference.beam_rules import AnyToken, Node, Rules, ValidNames
from megatron_ads.inference.engine import Completion
from megatron_ads.inference.name_answers import AdvertiserNames
from megatron_ads.journal import Journal
from megatron_ads.rows import ChatRow
from megatron_ads.tasks import advertiser_question
from megatron_ads.training.rollout.engine import RolloutEngine
from megatron_ads.training.rollout.generation import AnswerSettings, Generator
from megatron_ads.training.rollout.name_rules import NameRules
from megatron_ads.training.rollout.prompts import PolicyPrompt
from tests.evaluation.advertiser_rows import name_row

NAMES = AdvertiserNames(("Acme", "Acme Tools", "Bolt"), "here")
ROW, OTHER = name_row("1", "Acme"), builtin_rows(1)[0]
CHOSEN = advertiser_question.choose_one_row(ROW, "2", [f"Name {number}" for number in range(30)])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, 1536)
    return load_tokenizer(folder)


def _said(node: Node, tokenizer: ChatTokenizer, before: tuple[int, ...] = ()) -> list[str]:
    if not node.children:
        assert before[-1] == tokenizer.end_token_id
        return [tokenizer.decode(list(before[:-1]))]
    pairs = zip(node.tokens_C.tolist(), node.children, strict=True)
    return [text for token, child in pairs for text in _said(child, tokenizer, (*before, token))]


@pytest.mark.parametrize("opened", ["", "<think>", "<think></think>"])
def test_a_row_is_answered_with_its_names_behind_what_is_left_of_the_empty_block(
    tokenizer: ChatTokenizer, opened: str
) -> None:
    rules = NameRules(NAMES, tokenizer)
    for row, names in ((ROW, NAMES.names), (CHOSEN, CHOSEN.list_fact("candidates"))):
        of_row = rules.rules(row, opened)
        assert isinstance(of_row, ValidNames)
        texts = [f"<think></think>{name}" for name in names]
        assert sorted(opened + said for said in _said(of_row.start, tokenizer)) == sorted(texts)
    assert isinstance(rules.rules(OTHER, opened), AnyToken)


@pytest.mark.parametrize(
    ("rows", "names", "limit", "error", "said"),
    [
        ([OTHER], NAMES, 64, ConfigError, r"no effect: no row, of query_ad_relevance, is answered with a name"),
        ([OTHER, ROW], NAMES, 4, ConfigError, r"max_new_tokens is 4, but a valid answer to row '1' has \d+ tokens"),
        ([ROW], AdvertiserNames((), "here"), 64, DataError, "Row '1' has no valid names"),
    ],
)
def test_rows_that_cannot_be_answered_so_are_refused(
    tokenizer: ChatTokenizer,
    rows: list[ChatRow],
    names: AdvertiserNames,
    limit: int,
    error: type[Exception],
    said: str,
) -> None:
    NameRules(NAMES, tokenizer).check([(OTHER, ""), (ROW, "")], 64)
    with pytest.raises(error, match=said):
        NameRules(names, tokenizer).check([(row, "") for row in rows], limit)


class Counting:
    """An engine that keeps what it was asked for."""

    def __init__(self) -> None:
        self.rules: list[Sequence[Rules] | None] = []

    def generate(
        self, prompts: Sequence[Sequence[int]], config: GenerationConfig, *, rules: Sequence[Rules] | None = None
    ) -> list[list[Completion]]:
        self.rules.append(rules)
        return [[Completion(text="said", token_ids=(1,), log_probabilities=(-1.0,))] * config.samples for _ in prompts]


def test_the_engine_gets_the_rules_and_an_answer_by_other_names_is_generated_again(
    tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    engine = Counting()
    prompts = [PolicyPrompt(row=row, tokens=(1, 2), opened="") for row in (ROW, OTHER, CHOSEN)]
    settings = AnswerSettings(samples=2, max_new_tokens=64, seed=(0, 1), weights="0-a")
    fewer = AdvertiserNames(("Acme", "Bolt"), "here")
    for names in (None, NAMES, NAMES, fewer):
        with Journal(tmp_path / "journal.jsonl") as journal:
            generator = Generator(
                RolloutEngine(engine=cast(Any, engine), ranks=(0,), sync=cast(Any, None), longest_wait_seconds=9),
                {each.row.id: each.row for each in prompts},
                batch_size=6,
                journal=journal,
                longest_wait_seconds=9,
                on_progress=lambda: None,
                names=None if names is None else NameRules(names, tokenizer),
            )
            generator.answer_alone(prompts, settings)
    free, all_names, few_names = engine.rules
    assert free is None and all_names is not None and few_names is not None
    assert [type(each) for each in all_names] == [ValidNames, AnyToken, ValidNames]
