"""Questions of one epoch through an engine: what is equal is asked once, what cannot be read is drawn again.

Prompts go out in the order of their texts, task by task: those that begin alike follow one another, which is what the
prefix cache of a server needs.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from megatron_ads.config.generation import ModelKind
from megatron_ads.config.labelling import LabelConfig
from megatron_ads.data.chat import ChatTokenizer, load_tokenizer, opened_by, render_prompt
from megatron_ads.errors import DataError, one_line
from megatron_ads.inference.client import Usage
from megatron_ads.inference.engine import Completion, Engine, Finish, Prompt
from megatron_ads.inference.journalled_engine import JournalledEngine
from megatron_ads.inference.name_answers import NameForms
from megatron_ads.inference.openai_engine import OpenAIEngine
from megatron_ads.inference.servers import Server, Servers
from megatron_ads.journal import Journal
from megatron_ads.labelling.label_record import (
    OF_QUESTION,
    REFUSED_BY_TEMPLATE,
    TOO_LONG,
    LabelRecord,
    as_table,
    read_label,
)
from megatron_ads.labelling.parquet_files import epoch_files, metadata_of, read_table, write_table
from megatron_ads.labelling.question_store import LABELS, Question, QuestionStore
from megatron_ads.observability.log import get_logger
from megatron_ads.tasks.answer_format import CLOSE, OPEN

logger = get_logger(__name__)

OpenEngine = Callable[[Journal, int], Engine]
"""Gives what answers the rows of one epoch and one priority; what it has answered before is in the journal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asked:
    """A question as the engine gets it."""

    question: Question
    prompt: Prompt
    text: str
    """What prompts are ordered by."""
    opened: str = ""
    """What of the answer the prompt has already."""


class Labeller:
    """Labels the rows of one epoch after another."""

    def __init__(self, config: LabelConfig, open_engine: OpenEngine, tokenizer: ChatTokenizer | None) -> None:
        """Take the job, what answers, and the model's tokenizer; None: conversations are sent as they are."""
        self._config, self._open_engine, self._tokenizer = config, open_engine, tokenizer
        self._told = False
        self._forms = None if tokenizer is None else NameForms(tokenizer)
        self._decode = None if tokenizer is None or not config.log_probabilities else self._text_of

    def label_epoch(self, store: QuestionStore, epoch: int) -> int:
        """Label the rows of an epoch that waits, and return how many they are; its labels appear when all are there.

        An epoch that has its labels, as where a runner repeats what it thinks has failed, is left alone.
        """
        started = time.monotonic()
        if store.labels_file(epoch).exists():
            store.file(epoch).unlink(missing_ok=True)
            return 0
        questions = store.questions_of(epoch)
        with Journal(store.journal_file(epoch)) as journal:
            before = len(journal.records)
            labels = self.label(questions, journal)
            about = {
                **metadata_of(store.file(epoch)),
                "seconds": repr(time.monotonic() - started),
                "answered_before": str(before),
                "finished_at": repr(time.time()),
            }
            write_table(store.labels_file(epoch), as_table(labels), about)
            store.file(epoch).unlink(missing_ok=True)
            journal.delete()
        return len(labels)

    def label(self, questions: Sequence[Question], journal: Journal) -> list[LabelRecord]:
        """Return what became of each question, in order.

        Raises:
            ConfigError: If no request can succeed, such as with a wrong key.
            DataError: If the engine stopped answering; what it has answered is in the journal.
        """
        found: dict[int, LabelRecord] = {}
        same: dict[bytes, list[int]] = defaultdict(list)
        for number, question in enumerate(questions):
            if question.fault is None:
                same[question.digest].append(number)
            else:
                found[number] = _unasked(question, question.fault, question.why)
        asked = [self._asked(questions[numbers[0]]) for numbers in same.values()]
        unasked = [one for one in asked if isinstance(one, LabelRecord)]
        for label in chain(unasked, self._answered([one for one in asked if isinstance(one, _Asked)], journal)):
            for number in same[label.digest]:
                found[number] = _shared(label, questions[number])
        return [found[number] for number in range(len(questions))]

    def _asked(self, question: Question) -> _Asked | LabelRecord:
        if self._tokenizer is None:
            text = "\n".join(f"{message.role}: {message.content}" for message in question.messages)
            return _Asked(question=question, prompt=question.messages, text=text)
        assert self._forms is not None, "there with the tokenizer"
        try:
            text = render_prompt(question.messages, self._tokenizer)
        except DataError as error:
            if not self._told:
                self._told = True
                logger.warning("row %s: %s Such rows are counted as failures.", question.id, one_line(error))
            return _unasked(question, REFUSED_BY_TEMPLATE, str(error))
        opened = opened_by(text)
        tokens = self._tokenizer.encode(text)
        if not self._config.reasoning:
            tokens, opened = [*tokens, *self._forms.before(opened)], OPEN + CLOSE
        limit = self._config.max_prompt_tokens
        if limit is not None and len(tokens) > limit:
            return _unasked(question, TOO_LONG, f"the prompt has {len(tokens):,} tokens")
        return _Asked(question=question, prompt=tokens, text=text, opened=opened)

    def _answered(self, asked: Sequence[_Asked], journal: Journal) -> Iterator[LabelRecord]:
        priorities: dict[int, list[_Asked]] = defaultdict(list)
        for one in asked:
            priorities[self._config.priorities.get(one.question.task, 0)].append(one)
        for priority, of_priority in sorted(priorities.items()):
            engine = self._open_engine(journal, priority)
            of_priority.sort(key=lambda one: (one.question.task, one.text))
            yield from self._until_readable(engine, of_priority)

    def _until_readable(self, engine: Engine, asked: Sequence[_Asked]) -> Iterator[LabelRecord]:
        """Yield the label of every question: that of its first answer that can be read, or of its last one."""
        drawn: dict[bytes, list[Completion]] = defaultdict(list)
        for draw in range(self._config.draws):
            how = self._config.generation(draw)
            completions = engine.generate([one.prompt for one in asked], how)
            again = []
            for one, (completion,) in zip(asked, completions, strict=True):
                drawn[one.question.digest].append(completion)
                label = self._read(one, drawn[one.question.digest])
                never = completion.finish in (Finish.refused, Finish.unanswered)
                hopeless = never or draw + 1 == self._config.draws
                if label.failure is None or hopeless:
                    yield label
                else:
                    again.append(one)
            if not (asked := again):
                return

    def _read(self, asked: _Asked, completions: Sequence[Completion]) -> LabelRecord:
        said = completions[-1].text
        # A server whose chat template opens the reasoning returns only where it is closed.
        hidden = self._tokenizer is None and CLOSE in said and OPEN not in said
        return read_label(
            asked.question,
            completions,
            opened=OPEN if hidden else asked.opened,
            reasoning_required=self._config.reasoning,
            decode=self._decode,
        )

    def _text_of(self, tokens: Sequence[int]) -> str:
        assert self._tokenizer is not None
        return self._tokenizer.decode(list(tokens))


def _unasked(question: Question, failure: str, why: str | None) -> LabelRecord:
    return LabelRecord(**{name: getattr(question, name) for name in OF_QUESTION}, failure=failure, text=why)


def _shared(label: LabelRecord, question: Question) -> LabelRecord:
    """Return a label for a row that asks the same as the one that was asked, which alone has the cost."""
    if (label.source, label.row) == (question.source, question.row):
        return label
    own: dict[str, Any] = {name: getattr(question, name) for name in OF_QUESTION}
    return replace(label, **own, draws=0, prompt_tokens=0, answer_tokens=0, cached_tokens=None, seconds=0.0)


def usage_in(out: Path) -> Usage:
    """Return what the finished epochs of a job took, which counts for ``max_cost`` and says that the server works."""
    usage = Usage()
    for file in epoch_files(out / LABELS):
        columns = read_table(file, ["prompt_tokens", "answer_tokens", "finish"])
        usage.prompt_tokens += pc.sum(columns["prompt_tokens"]).as_py() or 0
        usage.answer_tokens += pc.sum(columns["answer_tokens"]).as_py() or 0
        for counted in pc.value_counts(columns["finish"].drop_null()).to_pylist():
            usage.finishes[counted["values"]] += counted["counts"]
    return usage


@contextmanager
def open_labeller(config: LabelConfig) -> Iterator[Labeller]:
    """Yield what labels by the model of a recipe: its servers, or a checkpoint in this process.

    Raises:
        ConfigError: If the key of a server is missing.
        ConversionError: If a folder is no checkpoint.
        DataError: If a folder has no tokenizer.
    """
    model = config.model
    with ExitStack() as stack:
        if model.kind is ModelKind.local:
            from megatron_ads.inference.model_folder import hugging_face_folder  # imports torch
            from megatron_ads.inference.transformers_engine import open_engine

            assert model.model is not None, "checked with the recipe"
            folder = stack.enter_context(hugging_face_folder(Path(model.model)))
            engine = stack.enter_context(closing(open_engine(folder)))
            tokenizer = load_tokenizer(folder, model.template_arguments)
            open_journalled = partial(JournalledEngine, engine, batch_size=model.batch_size)
            yield Labeller(config, lambda journal, priority: open_journalled(journal), tokenizer)
            return
        addresses = model.servers or [model.url or ""]
        each = [Server("model", model.of_server(address)) for address in addresses]
        servers = stack.enter_context(closing(Servers(each, wait_seconds=model.server_wait_seconds, section="model")))
        usage = usage_in(Path(config.out))
        together = replace(model, url=", ".join(addresses), servers=[], concurrency=model.concurrency * len(addresses))

        def open_served(journal: Journal, priority: int) -> Engine:
            also = {"priority": priority} if model.send_priority else None
            return OpenAIEngine("model", together, journal, servers=servers, also_sent=also, usage=usage, goes_on=True)

        folder_given = None if model.tokenizer is None else Path(model.tokenizer)
        served = load_tokenizer(folder_given, model.template_arguments) if folder_given else None
        yield Labeller(config, open_served, served)
