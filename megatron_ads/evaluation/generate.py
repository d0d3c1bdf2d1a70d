"""Let an engine answer held-out rows, of any task, in its own words or with a valid name."""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_ads.config.generation import GenerationConfig, Method
from megatron_ads.data.chat import ChatTokenizer, opened_by, render_prompt
from megatron_ads.evaluation.answer_records import Answer, AnswerBeam, AnswerJournal
from megatron_ads.evaluation.sampled_answers import ranked_samples
from megatron_ads.inference.beam_rules import NameTrie, ValidNames
from megatron_ads.inference.engine import Completion, Engine, Finish
from megatron_ads.inference.name_answers import NO_NAMES, AdvertiserNames, CollaborativeModel, NameForms, valid_names
from megatron_ads.inference.openai_engine import OpenAIEngine
from megatron_ads.metrics.text import MAX_EXPONENT
from megatron_ads.observability.log import get_logger
from megatron_ads.progress import Progress
from megatron_ads.rows import ChatRow
from megatron_ads.tasks.answer_format import CLOSE, OPEN

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Asking:
    """How rows are answered."""

    how: GenerationConfig = field(default_factory=GenerationConfig)
    max_new_tokens: Mapping[str, int]
    """Longest answer of each task, reasoning included; valid names may be longer."""
    batch_size: int
    """Sequences generated at once; a row with beams is several."""
    advertisers: AdvertiserNames = NO_NAMES
    """Valid names, for constrained beams."""
    training: Sequence[ChatRow] = ()
    """Trained on: what the collaborative model counts, where one is asked for."""

    def settings(self) -> dict[str, Any]:
        """Return what answers depend on besides the model and the rows, as JSON values."""
        # Journals are found by a digest of these: no name and no default may change.
        items = self.advertisers.items if self.how.method is Method.constrained_beam else ()
        names = ("method", "temperature", "top_p", "seed", "beams", "length", "collaborative")
        return {
            **{name: getattr(self.how, name) for name in names},
            "max_new_tokens": dict(sorted(self.max_new_tokens.items())),
            "batch_size": self.batch_size,
            "names": self.advertisers.names if self.how.method is Method.constrained_beam else None,
            "trained_on": [[row.label, row.prompt[-1].content] for row in self.training]
            if self.how.collaborative
            else None,
            **({"samples": self.how.samples} if self.how.samples > 1 else {}),
            **({"items": items} if items else {}),
        }


def answer_rows(asker: "RowAsker", *, journal: AnswerJournal | None = None) -> list[Answer]:
    """Return one answer per row of ``asker``, in order. Shows a progress bar.

    ``journal`` has what was answered before, and further answers are noted there.

    Raises:
        DataError: If there are names that cannot be told apart.
        ConversionError: If transformers cannot load the folder.
    """
    rows = asker.rows
    answers: dict[int, Answer] = {}
    before = journal.rows if journal else 0
    with Progress(len(rows), before, description="answering", unit="row") as progress:
        for number, batch in enumerate(asker.batches()):
            said = journal.answered(number, [rows[row] for row in batch]) if journal else None
            if said is None:
                started = time.monotonic()
                said = asker.answer(batch, draw=number)
                if journal:
                    journal.add(number, said, time.monotonic() - started)
                progress.update(len(batch))
            answers.update(zip(batch, said, strict=True))
    return [answers[index] for index in range(len(rows))]


class RowAsker:
    """Rows and the engine that answers them, a batch at a time. The engine is opened when the first batch is due."""

    def __init__(
        self, tokenizer: ChatTokenizer, rows: Sequence[ChatRow], asking: Asking, engine: Callable[[], Engine]
    ) -> None:
        """Write the prompts and the valid names; ``engine`` is called for every batch, and opens one at its first call.

        Raises:
            DataError: If names cannot be told apart, or one is too long.
        """
        self.rows = rows
        self._asking, self._engine = asking, engine
        prompts = [render_prompt(row.prompt, tokenizer) for row in rows]
        self._tokens, self._opened = list(map(tokenizer.encode, prompts)), list(map(opened_by, prompts))
        self._forms = NameForms(tokenizer)
        for number in range(len(rows)):  # names that cannot be used are refused before anything is answered
            if self._answers_by_name(number):
                self._trie(number)
        self._collaborative: CollaborativeModel | None = None

    def batches(self) -> list[list[int]]:
        """Return the numbers of the rows that are answered together: of one task, prompts of like length.

        Batches depend on the rows and on how they are asked, not on what has been answered before.
        """
        how, size = self._asking.how, self._asking.batch_size
        found = []
        for task in sorted({row.task for row in self.rows}):
            rows = [number for number, row in enumerate(self.rows) if row.task == task]
            rows.sort(key=lambda number: len(self._tokens[number]))
            with_beams = self._answers_by_name(rows[0]) or how.method is Method.beam
            width = max(1, size // (how.beams if with_beams else how.samples))
            found += [rows[start : start + width] for start in range(0, len(rows), width)]
        return found

    def answer(self, batch: Sequence[int], *, draw: int) -> list[Answer]:
        """Answer the rows of a batch, which are of one task; ``draw`` is the batch's number."""
        if self._answers_by_name(batch[0]):
            return self._names(batch)
        how = self._asking.how
        seed = hashlib.sha256(f"{how.seed}:{draw}".encode()).digest()
        config = replace(
            how,
            method=Method.greedy if how.method is Method.constrained_beam else how.method,
            seed=int.from_bytes(seed[:8], "big"),
            max_new_tokens=self._asking.max_new_tokens[self.rows[batch[0]].task],
            log_probabilities=how.samples > 1,
        )
        found = self._engine().generate([self._tokens[number] for number in batch], config)
        return [
            self._answer(number, completions, [self._opened[number] + one.text for one in completions])
            for number, completions in zip(batch, found, strict=True)
        ]

    def _answers_by_name(self, number: int) -> bool:
        constrained = self._asking.how.method is Method.constrained_beam
        return constrained and valid_names(self.rows[number], self._asking.advertisers) is not None

    def _names(self, batch: Sequence[int]) -> list[Answer]:
        how = self._asking.how
        tries = list(map(self._trie, batch))
        found = self._engine().generate(
            [[*self._tokens[number], *self._forms.before(self._opened[number])] for number in batch],
            replace(how, max_new_tokens=max(trie.depth for trie in tries)),
            rules=[self._rules(number, trie) for number, trie in zip(batch, tries, strict=True)],
        )
        answers = []
        for number, trie, beams in zip(batch, tries, found, strict=True):
            names = [trie.name_of(beam.token_ids or ()) for beam in beams]
            assert len(set(names)) == len(names) == min(how.beams, len(trie.names))
            answers.append(self._answer(number, beams, [self._forms.text(name) for name in names]))
        return answers

    def _trie(self, number: int) -> NameTrie:
        names = valid_names(self.rows[number], self._asking.advertisers)
        return self._forms.trie(names or (), self._opened[number])

    def _rules(self, number: int, trie: NameTrie) -> ValidNames:
        share = self._asking.how.collaborative
        if not share:
            return ValidNames(trie)
        if self._collaborative is None:
            self._collaborative = CollaborativeModel(self._asking.training)
        chances = self._collaborative.chances(self.rows[number], trie.names)
        return ValidNames(trie, chances=chances.tolist(), collaborative=share)

    def _answer(self, number: int, completions: Sequence[Completion], texts: Sequence[str]) -> Answer:
        beams = tuple(
            AnswerBeam(text, one.log_probability, one.score)
            for one, text in zip(completions, texts, strict=True)
            if one.score is not None
        )
        if beams:
            return Answer(self.rows[number], texts[0], completions[0].finish is Finish.ended, beams)
        return _one_answer(self.rows[number], completions, texts)


def answer_from_server(
    rows: Sequence[ChatRow], asking: Asking, engine: OpenAIEngine, tokenizer: ChatTokenizer | None
) -> list[Answer]:
    """Return one answer per row, in order. Shows a progress bar for each task.

    With a tokenizer, the server continues the tokens that training rendered; without one, it gets conversations and
    renders them itself. Rows that it calls impossible, such as too long ones, have an empty answer, and are counted; so
    have those whose answer stays empty after all attempts.

    Raises:
        UnsupportedError: If the server cannot generate so.
        ConfigError: If the key, the address or the model's name is wrong.
        DataError: If rows have no answer after all attempts, or the cost limit was reached.
    """
    answers: dict[int, Answer] = {}
    for task in sorted({row.task for row in rows}):
        numbers = [number for number, row in enumerate(rows) if row.task == task]
        texts = [render_prompt(rows[number].prompt, tokenizer) if tokenizer else "" for number in numbers]
        found = engine.generate(
            [
                tokenizer.encode(text) if tokenizer else rows[number].prompt
                for number, text in zip(numbers, texts, strict=True)
            ],
            replace(asking.how, max_new_tokens=asking.max_new_tokens[task], log_probabilities=asking.how.samples > 1),
            description=f"answering, {task}",
            needs_words=True,
        )
        for number, text, samples in zip(numbers, texts, found, strict=True):
            answers[number] = _one_answer(rows[number], samples, [_with_reasoning(text, said) for said in samples])
        silent = [of_row for of_row in found if all(said.finish is Finish.refused for said in of_row)]
        if silent:
            why = silent[0][0].text
            logger.warning("%d of %d rows of %s have no answer (%s).", len(silent), len(found), task, why)
    return [answers[number] for number in range(len(rows))]


def _one_answer(row: ChatRow, completions: Sequence[Completion], texts: Sequence[str]) -> Answer:
    """Return the only completion, or of several samples what most say, with the others as beams."""
    if len(completions) == 1:
        return Answer(row, texts[0], completions[0].finish is Finish.ended)
    beams = ranked_samples(row, texts, [_log_probability(one) for one in completions])
    return Answer(row, beams[0].text, completions[texts.index(beams[0].text)].finish is Finish.ended, beams)


def _log_probability(completion: Completion) -> float:
    """Return that of the whole completion; of one that a server refused, a probability of 0 as far as JSON has it."""
    return -MAX_EXPONENT if completion.log_probabilities is None else completion.log_probability


def _with_reasoning(prompt: str, said: Completion) -> str:
    if said.finish is Finish.refused:
        return ""
    # A server whose chat template opens the reasoning returns only where it is closed.
    hidden = not prompt and CLOSE in said.text and OPEN not in said.text
    return (OPEN if hidden else opened_by(prompt)) + said.text
