"""A checkpoint on this machine: its perplexities equal transformers' own loss, and it can be the teacher."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from megatron_ads.cooking.answering import Finish
from megatron_ads.cooking.candidates import Candidate, Removed
from megatron_ads.cooking.config import AnsweringConfig, ModelKind, PerplexityConfig
from megatron_ads.cooking.cook import cook, open_kitchen
from megatron_ads.cooking.local_model import LocalScorer, LocalTeacher
from megatron_ads.cooking.perplexity import remove_unlikely
from megatron_ads.cooking.report import as_report
from megatron_ads.cooking.requests import chat_request
from megatron_ads.data.chat import split_text
from megatron_ads.data.jsonl import jsonl_rows
from megatron_ads.data.tokenizer import load_tokenizer
from megatron_ads.journal import Journal
from tests.cooking.kitchens import recipe, write_rows
from tests.cooking.tiny_model import POSITIONS, write_tiny_model

CLOSE_TO_TRANSFORMERS = 1e-5
"""Relative: the mean is taken in another order."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def candidate(tmp_path: Path) -> Callable[[str], Candidate]:
    (row,) = jsonl_rows(write_rows(tmp_path / "rows.jsonl", 1))
    return lambda reasoning: Candidate(row=row, number=0, text="", reasoning=reasoning)


def expected_perplexity(folder: Path, candidate: Candidate) -> float:
    """Return exp of the loss that transformers computes itself, with labels on the answer only."""
    tokenizer = load_tokenizer(folder)
    prompt, _ = split_text(candidate.row, tokenizer)
    opened = prompt.rstrip().endswith("<think>")
    before = tokenizer.encode(prompt + ("" if opened else "<think>") + candidate.reasoning + "</think>")
    answer = tokenizer.encode("<Label>Bad</Label>")
    labels = torch.tensor([[-100] * len(before) + answer])
    with torch.inference_mode():
        loss = LlamaForCausalLM.from_pretrained(folder).eval()(torch.tensor([before + answer]), labels=labels).loss
    return float(torch.exp(loss))


def test_the_perplexity_of_the_answer_is_transformers_own(
    model: Path, tmp_path: Path, candidate: Callable[[str], Candidate]
) -> None:
    one, other = candidate("The kettle is sturdy."), candidate("Nothing in it fits the wish for a kettle.")
    with Journal(tmp_path / "p.jsonl") as journal:
        scorer = LocalScorer(model, journal)
        found = [scorer.perplexity(one), scorer.perplexity(other)]
    assert found == pytest.approx(
        [expected_perplexity(model, one), expected_perplexity(model, other)], rel=CLOSE_TO_TRANSFORMERS
    )
    assert abs(found[0] / found[1] - 1) > 100 * CLOSE_TO_TRANSFORMERS  # type: ignore[operator]  # reasoning matters


def test_perplexities_are_measured_once(model: Path, tmp_path: Path, candidate: Callable[[str], Candidate]) -> None:
    known = candidate("The kettle is sturdy.")
    with Journal(tmp_path / "p.jsonl") as journal:
        found = LocalScorer(model, journal).perplexity(known)
    with Journal(tmp_path / "p.jsonl") as journal:
        scorer = LocalScorer(model, journal)
        assert scorer.perplexity(known) == found
        assert "weights" not in vars(scorer._model)  # they are loaded at the first use


def test_what_the_model_cannot_read_is_removed(
    model: Path, tmp_path: Path, candidate: Callable[[str], Candidate]
) -> None:
    short, long = candidate("The kettle is sturdy."), candidate("kettle " * POSITIONS)
    with Journal(tmp_path / "p.jsonl") as journal:
        limit = remove_unlikely([short, long], LocalScorer(model, journal), PerplexityConfig(threshold=1e9), seed=0)
    assert limit == 1e9
    assert (short.removed, long.removed) == (None, Removed.answer_too_long)


def test_a_checkpoint_answers_as_a_server_would(model: Path) -> None:
    config = AnsweringConfig(kind=ModelKind.local, model=str(model), max_tokens=12, temperature=1.0)
    teacher, stop = LocalTeacher(config), threading.Event()
    answers = [
        teacher.answer(chat_request([{"role": "user", "content": "Why?"}], config, seed=seed), stop)
        for seed in (1, 1, 2)
    ]
    assert answers[0].text == answers[1].text != answers[2].text
    for answer in answers:
        assert answer.finish is (Finish.cut_off if answer.answer_tokens == 12 else Finish.ended)
    long = [{"role": "user", "content": "kettle " * POSITIONS}]
    assert teacher.answer(chat_request(long, config, seed=1), stop).finish is Finish.refused


def test_a_checkpoint_as_teacher_goes_through_the_whole_run(model: Path, tmp_path: Path) -> None:
    local = ["teacher.kind=local", f"teacher.model='{model}'", "teacher.url=null", "teacher.max_tokens=8"]
    config = recipe(tmp_path, "http://unused/v1", *local, f"perplexity.model='{model}'", rows=2)
    tokens = set()
    for asked, known in ((2, 0), (0, 2)):
        with open_kitchen(config) as kitchen:
            report = as_report(cook(config, kitchen), kitchen, config)
        assert report["candidates"] == 2
        assert sum(found["removed"] for found in report["filters"]) == 2  # a random model says nothing that is kept
        used = report["models"]["teacher"]
        assert (used["asked"], used["from_journal"]) == (asked, known)
        tokens.add(used["answer_tokens"])
    assert len(tokens) == 1
    assert 2 <= min(tokens) <= 16
