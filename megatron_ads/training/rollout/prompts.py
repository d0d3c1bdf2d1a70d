"""The prompts of a reinforcement learning job: the rows they come from, and the endless order of their drawing.

Order and shares of sources are those of fine-tuning on the same rows, a prompt in place of a packed sample.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import chain
from typing import Any, Self

import numpy as np

from megatron_ads.config.data import DataConfig
from megatron_ads.data.batches import require_same_sequence
from megatron_ads.data.chat import ChatTokenizer, opened_by, render_prompt, tokenize_row
from megatron_ads.data.corpus import read_corpus
from megatron_ads.data.mixing import Mixture, WeightedRows
from megatron_ads.data.sources import describe_source
from megatron_ads.errors import DataError
from megatron_ads.inference.name_answers import names_trained_on
from megatron_ads.layout import rank
from megatron_ads.observability.log import get_logger
from megatron_ads.rows import ChatRow, TokenizedRow
from megatron_ads.training.rollout.name_rules import NameRules

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyPrompt:
    """What the policy answers."""

    row: ChatRow
    tokens: tuple[int, ...]
    opened: str
    """What the chat template has written of the answer already, such as ``<think>``."""


class PromptStream:
    """The endless sequence of prompts; its state is one count per source, the same on every rank."""

    def __init__(
        self, sources: Sequence[Sequence[PolicyPrompt]], names: Sequence[str], weights: Sequence[float], seed: int
    ) -> None:
        """Start at the first prompt.

        Raises:
            DataError: If a source has no prompt.
        """
        self._prompts = [prompt for source in sources for prompt in source]
        named = zip(sources, names, weights, strict=True)
        weighted = [WeightedRows([*map(_as_row, source)], weight, name) for source, name, weight in named]
        self._mixture, self._seed = Mixture(weighted, seed=seed), seed

    def draw(self, count: int) -> list[PolicyPrompt]:
        """Return the next prompts."""
        return [self._prompts[self._mixture.draw().number] for _ in range(count)]

    def at(self, state: Mapping[str, Any]) -> Self:
        """Return another stream of the same prompts, which is where ``state`` was taken."""
        other = copy(self)
        other._mixture = copy(self._mixture)  # whose state is replaced, not changed, by what follows
        other.load_state_dict(state)
        return other

    def state_dict(self) -> dict[str, Any]:
        """Return the current state, and of which sequence it is."""
        of_sequence = {"rows": list(self._mixture.sizes), "contents": list(self._mixture.contents), "seed": self._seed}
        return {**self._mixture.state_dict(), **of_sequence}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken.

        Raises:
            DataError: If it belongs to other prompts or another seed.
        """
        require_same_sequence(self._mixture, self._seed, state)
        self._mixture.load_state_dict(state)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompts:
    """All prompts of a job."""

    stream: PromptStream
    held_out: list[PolicyPrompt]
    """Answered in evaluations."""
    probe: list[TokenizedRow]
    """Rows with their targets, whose log-probabilities tell weights apart; never empty."""
    rows: dict[str, ChatRow]
    """Every row that has a prompt, by its id."""
    names: NameRules | None = None
    """What may be answered, with ``rollout.valid_names``."""


def open_prompts(
    data: DataConfig, tokenizer: ChatTokenizer, *, max_new_tokens: int, probe_rows: int, valid_names: bool = False
) -> Prompts:
    """Read the rows of a recipe and render their prompts.

    Prompts that leave no room for ``max_new_tokens`` in ``data.seq_length`` are left out and counted.

    Raises:
        DataError: If a source cannot be read or has no prompt left, two rows have the same id, or there are no valid
            names, or one that is too long.
        ConfigError: If ``valid_names`` has no effect.
    """
    corpus = read_corpus(data)
    longest = data.seq_length - max_new_tokens
    training = [_fitting(rows, tokenizer, longest) for rows in corpus.training]
    for source, of_source, prompts in zip(corpus.sources, corpus.training, training, strict=True):
        if of_source and not prompts:
            raise DataError(
                f"None of the {len(of_source)} prompts of {describe_source(source)} has at most data.seq_length - "
                f"rollout.max_new_tokens = {data.seq_length} - {max_new_tokens} = {longest} tokens and a weight above "
                "0. Raise data.seq_length, or lower rollout.max_new_tokens."
            )
    held_out = _fitting(corpus.validation, tokenizer, longest)
    kept = [prompt for source in (*training, held_out) for prompt in source]
    rows = sum(map(len, corpus.training), len(corpus.validation))
    if len(kept) < rows and rank() == 0:
        logger.warning(
            "%d of %d prompts are left out: they have more than data.seq_length - rollout.max_new_tokens = %d - %d = "
            "%d tokens, or a weight of 0",
            *(rows - len(kept), rows, data.seq_length, max_new_tokens, longest),
        )
    stream = PromptStream(
        training, [*map(describe_source, corpus.sources)], [source.weight for source in corpus.sources], data.seed
    )
    by_id = {prompt.row.id: prompt.row for prompt in kept}
    if len(by_id) < len(kept):
        ids = [prompt.row.id for prompt in kept]
        twice = next(name for name in ids if ids.count(name) > 1)
        raise DataError(f"Two rows have the id {twice!r}; rollouts name rows by it. Give each row an id of its own.")
    names = None
    if valid_names:
        names = NameRules(names_trained_on(chain.from_iterable(corpus.training)), tokenizer)
        names.check([(prompt.row, prompt.opened) for prompt in kept], max_new_tokens)
    return Prompts(
        stream=stream,
        held_out=held_out,
        probe=_probe([prompt.row for prompt in held_out + training[0]], tokenizer, probe_rows, data.seq_length),
        rows=by_id,
        names=names,
    )


def _fitting(rows: Sequence[ChatRow], tokenizer: ChatTokenizer, longest: int) -> list[PolicyPrompt]:
    prompts = [_prompt(row, tokenizer) for row in rows if row.weight]
    return [prompt for prompt in prompts if len(prompt.tokens) <= longest]


def _prompt(row: ChatRow, tokenizer: ChatTokenizer) -> PolicyPrompt:
    try:
        text = render_prompt(row.prompt, tokenizer)
    except DataError as error:
        raise DataError(f"Row {row.id!r}: {error}") from None
    return PolicyPrompt(row=row, tokens=tuple(tokenizer.encode(text)), opened=opened_by(text))


def _as_row(prompt: PolicyPrompt) -> TokenizedRow:
    tokens = np.array(prompt.tokens, dtype=np.int32)
    return TokenizedRow(prompt.row.id, prompt.row.task, tokens, np.zeros(len(tokens), dtype=np.float32))


def _probe(rows: Sequence[ChatRow], tokenizer: ChatTokenizer, count: int, seq_length: int) -> list[TokenizedRow]:
    """Return the first rows that fit with their targets; one at least, as rollouts are marked by what is said of it."""
    found: list[TokenizedRow] = []
    for row in rows:
        tokenized = tokenize_row(row, tokenizer)
        if tokenized.predictions <= seq_length:
            found.append(tokenized)
        if len(found) == max(count, 1):
            break
    if not found:
        raise DataError(f"No row fits into data.seq_length = {seq_length} with its target. Raise it.")
    return found
