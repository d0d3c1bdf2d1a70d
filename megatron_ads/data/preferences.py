"""Sets of a chosen answer and rejected ones to the same prompt, in tokens, and the order in which a job draws them.

A row that names rejected answers (the fact ``rejected``) has those. Of a question with candidates, ``choose_one``, the
true name is chosen and other candidates are rejected, as in S-DPO (arXiv:2406.09215); reasoning before the name stays,
the same in every answer, so that no gradient is left on it.

Shape suffixes: N = answers of several sets, one set after the other, the chosen one first.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_ads.config.data import DataConfig
from megatron_ads.config.preference import PreferenceLossConfig
from megatron_ads.data.batches import require_same_sequence
from megatron_ads.data.chat import ChatTokenizer, tokenize_row
from megatron_ads.data.corpus import read_corpus
from megatron_ads.data.mixing import Mixture, WeightedRows, content_of, row_digest
from megatron_ads.data.sources import describe_source
from megatron_ads.errors import DataError
from megatron_ads.layout import rank
from megatron_ads.metrics.ranking import each_once, same_name
from megatron_ads.observability.log import get_logger
from megatron_ads.rows import ChatRow, Fact, Message, Role, TokenizedRow
from megatron_ads.stable_random import stable_random
from megatron_ads.tasks.advertiser_question import CHOOSE_ONE
from megatron_ads.tasks.answer_format import ReadFailure, split_reasoning

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class PreferenceSet:
    """One prompt."""

    answers: tuple[TokenizedRow, ...]
    """The chosen one first; each is prompt, answer and end token, with weight 1 on answer and end token."""
    weight: float
    """Multiplies the loss of the set."""


class Answers(NamedTuple):
    """The answers of several sets, laid out for a loss."""

    rows: list[TokenizedRow]
    set_N: NDArray[np.int64]
    """Place of its set among these."""
    chosen_N: NDArray[np.bool_]
    weight_S: NDArray[np.float64]
    """Of each set."""

    @classmethod
    def of(cls, sets: Sequence[PreferenceSet]) -> "Answers":
        """Lay sets out one after the other."""
        sizes = [len(each.answers) for each in sets]
        chosen_N = np.concatenate([np.arange(size) == 0 for size in sizes])
        set_N, weight_S = np.repeat(np.arange(len(sets)), sizes), np.array([each.weight for each in sets])
        return cls([row for each in sets for row in each.answers], set_N, chosen_N, weight_S)


def rejected_answers(row: ChatRow, count: int, *, seed: int) -> list[str]:
    """Return at most ``count`` answers that are worse than the row's target, drawn by its id; none if it tells none.

    Raises:
        DataError: If its fact ``rejected`` is no list of texts.
    """
    if Fact.rejected in row.facts:
        given = dict.fromkeys(row.list_fact(Fact.rejected))
        worse = [text for text in given if text.strip() and text != row.target]
    else:
        worse = list(_other_candidates(row))
    return worse if len(worse) <= count else stable_random("rejected", seed, row.id).sample(worse, count)


def _other_candidates(row: ChatRow) -> Iterator[str]:
    parts = split_reasoning(row.target, required=False)
    if row.task != CHOOSE_ONE or Fact.candidates not in row.facts or isinstance(parts, ReadFailure):
        return
    before, _, behind = row.target.rpartition(parts.answer)
    for name in each_once(row.list_fact(Fact.candidates)):
        if same_name(name) != same_name(parts.answer):
            yield before + name + behind


def preference_sets(
    rows: Sequence[ChatRow], tokenizer: ChatTokenizer, *, negatives: int, seq_length: int, seed: int
) -> tuple[list[PreferenceSet], Counter[str]]:
    """Return the sets of the rows that tell a preference and fit, and why the others are left out.

    Raises:
        DataError: If the chat template refuses a conversation.
    """
    sets, left_out = [], Counter[str]()
    for row in rows:
        texts = [row.target, *rejected_answers(row, negatives, seed=seed)]
        answers = [_tokenized(row, text, number, tokenizer) for number, text in enumerate(texts)]
        if len(texts) == 1:
            left_out["without rejected answers"] += 1
        elif row.weight == 0:
            left_out["of weight 0"] += 1
        elif max(answer.predictions for answer in answers) > seq_length:
            left_out["with an answer longer than data.seq_length"] += 1
        else:
            sets.append(PreferenceSet(tuple(answers), row.weight))
    return sets, left_out


def _tokenized(row: ChatRow, text: str, number: int, tokenizer: ChatTokenizer) -> TokenizedRow:
    messages = (*row.prompt, Message(Role.assistant, text))
    return tokenize_row(replace(row, id=f"{row.id}/{number}", messages=messages, weight=1.0), tokenizer)


class ReferencedSets:
    """Sets by number, and the log-probabilities of their answers under the reference as far as they are known."""

    def __init__(self, sets: Sequence[PreferenceSet]) -> None:
        self.sets = list(sets)
        ends = list(accumulate(len(each.answers) for each in self.sets))
        self.reference_N = np.full(ends[-1] if ends else 0, np.nan)
        """Nats over all tokens of each answer; NaN: not known."""
        self._reference_of = np.split(self.reference_N, ends[:-1])  # views

    def answers_of(self, numbers: Sequence[int]) -> Answers:
        """Return the answers of some sets."""
        return Answers.of([self.sets[number] for number in numbers])

    def are_known(self, numbers: Sequence[int]) -> bool:
        """Whether there is a reference value for every answer of some sets."""
        return not np.isnan(self.reference_of(numbers)).any()

    def reference_of(self, numbers: Sequence[int]) -> NDArray[np.float64]:
        """Return what is known of the answers of some sets, (N,)."""
        return np.concatenate([self._reference_of[number] for number in numbers])

    def fill(self, numbers: Sequence[int], values_N: NDArray[np.float64]) -> None:
        """Take in the answers of some sets; what is known already stays."""
        start = 0
        for number in numbers:
            known = self._reference_of[number]
            known[:] = np.where(np.isnan(known), values_N[start : start + len(known)], known)
            start += len(known)


class PreferenceStream:
    """The endless sequence of steps, the same on every rank; its state also holds the known reference values."""

    def __init__(self, sources: Sequence[tuple[Sequence[PreferenceSet], float, str]], *, per_step: int, seed: int):
        """Start at the first step; ``sources`` are sets with the weight and the name of their source.

        Raises:
            DataError: If a source has no sets.
        """
        weighted = [
            WeightedRows([each.answers[0] for each in sets], weight, name, known_content=_content(sets))
            for sets, weight, name in sources
        ]
        self._mixture = Mixture(weighted, seed=seed)
        self._per_step, self._seed = per_step, seed
        self.sets = ReferencedSets([each for sets, _, _ in sources for each in sets])

    def next_step(self) -> list[int]:
        """Return the numbers of the sets of the next step."""
        return [self._mixture.draw().number for _ in range(self._per_step)]

    def upcoming(self, steps: int) -> list[list[int]]:
        """Return the same for some steps to come; they are not drawn yet."""
        draws = [self._mixture.draw() for _ in range(steps * self._per_step)]
        self._mixture.put_back([draw.source for draw in draws])
        numbers = [draw.number for draw in draws]
        return [numbers[start : start + self._per_step] for start in range(0, len(numbers), self._per_step)]

    def state_dict(self) -> dict[str, Any]:
        """Return the current state, and of which sequence it is; independent of the layout."""
        of_sequence = {"rows": list(self._mixture.sizes), "contents": list(self._mixture.contents), "seed": self._seed}
        known = np.flatnonzero(~np.isnan(self.sets.reference_N))  # Megatron-Core compares the ranks' states: no NaN
        reference = {"answers": torch.from_numpy(known), "log_p": torch.from_numpy(self.sets.reference_N[known])}
        return {**self._mixture.state_dict(), **of_sequence, "reference": reference}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken.

        Raises:
            DataError: If it belongs to other rows, other rejected answers or another seed.
        """
        require_same_sequence(self._mixture, self._seed, state)
        self._mixture.load_state_dict(state)
        reference = state["reference"]
        self.sets.reference_N[reference["answers"].numpy()] = reference["log_p"].numpy()


def _content(sets: Sequence[PreferenceSet]) -> str:
    return content_of(row_digest(answer) + str(each.weight).encode() for each in sets for answer in each.answers)


def open_preferences(
    data: DataConfig, settings: PreferenceLossConfig, tokenizer: ChatTokenizer, *, per_step: int
) -> tuple[PreferenceStream, ReferencedSets]:
    """Return the endless steps of a recipe, ``per_step`` sets each, and its held-out sets.

    Rows that tell no preference, or do not fit, are left out and counted.

    Raises:
        DataError: If a source cannot be read, or no set of it is left.
    """
    corpus = read_corpus(data)
    make = partial(
        _sets_of, tokenizer=tokenizer, negatives=settings.negatives, seq_length=data.seq_length, seed=data.seed
    )
    sources = [
        (make(rows, f"training rows of {describe_source(source)}"), source.weight, describe_source(source))
        for rows, source in zip(corpus.training, corpus.sources, strict=True)
    ]
    held_out = make(corpus.validation, "held-out rows") if corpus.validation else []
    return PreferenceStream(sources, per_step=per_step, seed=data.seed), ReferencedSets(held_out)


def _sets_of(rows: Sequence[ChatRow], name: str, **settings: Any) -> list[PreferenceSet]:
    sets, left_out = preference_sets(rows, **settings)
    counts = ", ".join(f"{count} {reason}" for reason, count in left_out.most_common())
    if not sets:
        raise DataError(
            f"None of the {len(rows)} {name} can be used as a preference: {counts}. Rows of kind preference have "
            "rejected answers, as have rows with the fact rejected and those of the next advertiser with variant: "
            f"choose_one; longer answers need a higher data.seq_length = {settings['seq_length']}."
        )
    if left_out and rank() == 0:
        logger.warning("%s that are left out: %s", name, counts)
    return sets
