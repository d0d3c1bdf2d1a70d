"""What an evaluation is of: a checkpoint that answers in this process, or a server that speaks the OpenAI protocol.

Held-out rows of general domains are measured too: no ads task reads their answers, so what counts is how probable their
targets are. A domain is what such rows have in place of a task: ``gsm8k``, ``chat`` or any other name. Its perplexity
is that of the tokens of all its targets, with their end tokens.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from megatron_ads.config.generation import EndpointConfig
from megatron_ads.data.chat import ChatTokenizer, load_tokenizer, tokenize_row
from megatron_ads.evaluation.answer_records import Answer, AnswerJournal, fingerprint, open_journal, write_answers
from megatron_ads.evaluation.generate import Asking, RowAsker, answer_from_server, answer_rows
from megatron_ads.inference.engine import Engine, UnsupportedError
from megatron_ads.inference.model_folder import hugging_face_folder
from megatron_ads.inference.openai_engine import OpenAIEngine
from megatron_ads.inference.transformers_engine import TransformersEngine, open_engine
from megatron_ads.journal import Journal
from megatron_ads.metrics.text import perplexity
from megatron_ads.observability.log import get_logger
from megatron_ads.progress import Progress
from megatron_ads.rows import ChatRow

logger = get_logger(__name__)


@contextmanager
def open_model(
    model: Path | EndpointConfig,
    tokenizer_folder: Path | None = None,
    template_arguments: Mapping[str, Any] | None = None,
) -> "Iterator[CheckpointModel | ServedModel]":
    """Yield what answers; ``tokenizer_folder`` is for a server, a checkpoint has its own.

    ``template_arguments`` are those of the chat template, whoever renders it.

    Raises:
        ConversionError: If the folder is no checkpoint.
        DataError: If a folder does not exist, or has no tokenizer.
    """
    if isinstance(model, EndpointConfig):
        tokenizer = load_tokenizer(tokenizer_folder, template_arguments) if tokenizer_folder else None
        given = {**(template_arguments or {}), **model.template_arguments}
        yield ServedModel(replace(model, template_arguments=given), tokenizer)
        return
    with hugging_face_folder(model) as folder:
        yield CheckpointModel(model, folder, template_arguments)


class CheckpointModel:
    """A checkpoint, answering in this process."""

    def __init__(self, model: Path, folder: Path, template_arguments: Mapping[str, Any] | None = None) -> None:
        """Read the tokenizer; weights are loaded when they are needed. ``folder`` is ``model``, or its export."""
        self._model = model
        self.tokenizer = load_tokenizer(folder, template_arguments)
        self._engine: Callable[[], TransformersEngine] = cache(partial(open_engine, folder))

    def answer(self, rows: Sequence[ChatRow], asking: Asking, file: Path | None) -> tuple[list[Answer], float]:
        """Return the answers and the seconds they took; with a file, continue where an earlier run stopped."""
        start = time.monotonic()
        asker = RowAsker(self.tokenizer, rows, asking, self._engine)
        if file is None:
            return answer_rows(asker), time.monotonic() - start
        arguments = self.tokenizer.template_arguments
        settings = asking.settings() | ({"template_arguments": dict(arguments)} if arguments else {})
        with open_journal(file, fingerprint(self._model, rows, settings)) as journal:
            before = AnswerJournal(journal)
            answers = answer_rows(asker, journal=before)
            write_answers(file, answers)
            journal.delete()
            return answers, before.seconds + time.monotonic() - start

    def general(self, rows: Sequence[ChatRow], batch_size: int) -> dict[str, dict[str, float]]:
        return general_scores(self._engine(), self.tokenizer, rows, batch_size=batch_size)


class ServedModel:
    """A model behind a server."""

    def __init__(self, config: EndpointConfig, tokenizer: ChatTokenizer | None) -> None:
        """Take the server's settings and, to send tokens instead of conversations, the model's tokenizer."""
        self._config, self.tokenizer = config, tokenizer

    def answer(self, rows: Sequence[ChatRow], asking: Asking, file: Path | None) -> tuple[list[Answer], float]:
        """Return the answers and the seconds they took; with a file, what an earlier run got is not asked again."""
        start = time.monotonic()
        if file is None:
            return self._ask(rows, asking, None), time.monotonic() - start
        with open_journal(file, {"the model": f"{self._config.model} at {self._config.url}"}) as journal:
            answers = self._ask(rows, asking, journal)
            write_answers(file, answers)
            journal.delete()
            return answers, time.monotonic() - start

    def _ask(self, rows: Sequence[ChatRow], asking: Asking, journal: Journal | None) -> list[Answer]:
        with closing(OpenAIEngine("server", self._config, journal)) as engine:
            answers = answer_from_server(rows, asking, engine, self.tokenizer)
            used = engine.client.usage
        cost = used.cost(self._config)
        logger.info(
            "%d requests answered, %d before; %d prompt and %d answer tokens%s%s.",
            *(used.asked, used.from_journal, used.prompt_tokens, used.answer_tokens),
            "" if cost is None else f", cost {cost:.4g}",
            "".join(f"; {count} attempts failed: {failure}" for failure, count in used.failures.most_common()),
        )
        return answers

    def general(self, rows: Sequence[ChatRow], batch_size: int) -> dict[str, dict[str, float]]:
        """Return the perplexity of general rows by domain; empty, and logged, if the server does not say."""
        why = "it needs --tokenizer DIR."
        if self.tokenizer is not None:
            with closing(OpenAIEngine("server", self._config)) as engine:
                try:
                    return general_scores(engine, self.tokenizer, rows, batch_size=batch_size)
                except UnsupportedError as error:
                    why = str(error)
        logger.warning("The perplexity of %d general rows is not measured: %s", len(rows), why)
        return {}


def general_scores(
    engine: Engine, tokenizer: ChatTokenizer, rows: Sequence[ChatRow], *, batch_size: int
) -> dict[str, dict[str, float]]:
    """Return number of rows and perplexity by domain. Shows a progress bar."""
    # A row of weight 0 is not trained on; its target counts here all the same.
    weighed = [replace(row, weight=1.0) for row in rows]
    tokenized = sorted((tokenize_row(row, tokenizer) for row in weighed), key=lambda row: len(row.tokens))
    said: dict[str, list[float]] = defaultdict(list)
    with Progress(len(rows), description="reading general rows", unit="row") as progress:
        for start in range(0, len(rows), batch_size):  # rows of like length together: little is padded
            batch = tokenized[start : start + batch_size]
            prompts = [row.tokens[: -row.target_count].tolist() for row in batch]
            targets = [row.tokens[-row.target_count :].tolist() for row in batch]
            for row, of_row in zip(batch, engine.log_probabilities(prompts, targets), strict=True):
                said[row.task] += of_row
            progress.update(len(batch))
    counts = Counter(row.task for row in rows)
    return {
        domain: {"rows": counts[domain], "perplexity": perplexity(-sum(values), len(values))}
        for domain, values in sorted(said.items())
    }
