"""The records that rows of data are on their way to a batch, and the facts that a row carries besides its texts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NoReturn, TypeAlias, TypeGuard

import numpy as np
from numpy.typing import NDArray

from megatron_ads.errors import DataError

JsonValue: TypeAlias = "bool | int | float | str | Sequence[JsonValue] | Mapping[str, JsonValue] | None"
Facts: TypeAlias = Mapping[str, JsonValue]
"""By the keys of :class:`Fact`; further keys are allowed, and nothing here reads them."""


class Role(StrEnum):
    """Who says a message."""

    system = "system"
    user = "user"
    assistant = "assistant"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str

    def as_dict(self) -> dict[str, Any]:
        """Return the form that chat templates take."""
        return {"role": str(self.role), "content": self.content}


class Fact(StrEnum):
    """What a row may say besides its texts: what its prompt was rendered from, and the true answer."""

    query = "query"
    """Text: what somebody searched for."""
    ad = "ad"
    """Object: title, description, seller; unknown ones are empty."""
    user = "user"
    """Text: the user's id."""
    demographics = "demographics"
    """Object: age, gender, state; unknown ones are left out."""
    events = "events"
    """List of objects, everything known of the user: kind, days_ago, text, category, brand, advertiser, semantic_id,
    item_id; empty ones are left out."""
    history = "history"
    """Object: the entries that the prompt shows of each section of the history, newest or most frequent first."""
    pool = "pool"
    """Texts: advertisers shown to every user."""
    candidates = "candidates"
    """Texts, in the order shown: the names that the answer may be."""
    advertiser = "advertiser"
    """Text: the advertiser that a yes-or-no question is about."""
    keyword = "keyword"
    """Text: what queries are written for."""
    queries_wanted = "queries_wanted"
    keywords = "keywords"
    """Texts: what an ad can be found by already."""
    goal = "goal"
    """Text: what an ad is rewritten for."""
    request = "request"
    """Text: what two systems answered; ``current`` and ``new`` are their outputs."""
    current = "current"
    new = "new"
    next_item = "next_item"
    """Text: id of the item that the user converts with next; ``next_semantic_id`` is its semantic ID."""
    next_semantic_id = "next_semantic_id"
    question = "question"
    """Text: the question of a general row."""
    text = "text"
    """Text: the prompt of a row that came as text in a form that no template of its task has."""
    read_from_prompt = "read_from_prompt"
    """True: the facts above were read back from the prompt's text, where a name with "; " in it comes apart."""
    ground_truth = "ground_truth"
    """The true answer: in ads tasks an object with the fields of the task's answer, else whatever the data have."""
    reasoning = "reasoning"
    """Text: the reasoning of the target; empty or missing without any."""
    rejected = "rejected"
    """Texts: answers to the same prompt that are worse than the target."""
    prompt_alone = "prompt_alone"
    """True: the row came without an answer, for rewards; its target stands in for one, and is not checked."""
    best_answers = "best_answers"
    """Texts, as labels are written, the likeliest first: what somebody would say who knows how the data were drawn."""


FACTS_OF_ANSWERS = frozenset({
    Fact.ground_truth, Fact.reasoning, Fact.rejected, Fact.best_answers, Fact.prompt_alone, Fact.next_item,
    Fact.next_semantic_id,
})  # fmt: skip
"""Facts of a row's answer; all others are of its prompt."""
_SHOWN = (
    Fact.text, Fact.query, Fact.keyword, Fact.goal, Fact.request, Fact.current, Fact.new, Fact.history, Fact.ad,
    Fact.keywords, Fact.pool, Fact.candidates, Fact.advertiser,
)  # fmt: skip
"""Facts whose texts a prompt shows."""


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _are_texts(value: object) -> TypeGuard[Sequence[str]]:
    return isinstance(value, list | tuple) and all(map(_is_text, value))


def _is_object(value: object) -> bool:
    return isinstance(value, Mapping)


_FORMS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys((Fact.pool, Fact.candidates, Fact.keywords, Fact.rejected), ("a list of texts", _are_texts)),
    **dict.fromkeys((Fact.demographics, Fact.ground_truth), ("an object", _is_object)),
    Fact.best_answers: ("a list of at least one text", lambda value: _are_texts(value) and bool(value)),
    Fact.ad: ("an object of texts", lambda value: _is_object(value) and all(map(_is_text, value.values()))),
    Fact.history: (
        "an object of lists of texts", lambda value: _is_object(value) and all(map(_are_texts, value.values()))
    ),
    Fact.events: ("a list of objects", lambda value: isinstance(value, list) and all(map(_is_object, value))),
    Fact.queries_wanted: ("a whole number", lambda value: type(value) is int),
    **dict.fromkeys((Fact.read_from_prompt, Fact.prompt_alone), ("true or false", lambda value: type(value) is bool)),
}  # fmt: skip
"""What the facts of an ads task are; those not named here are texts."""


def wrong_fact(facts: Facts) -> str | None:
    """Return a sentence on the first fact of an ads task's row that is not of its type; None if all are."""
    for name in Fact:
        wanted, fits = _FORMS.get(name, ("a text", _is_text))
        if name in facts and not fits(facts[name]):
            return f"the fact {name} is {facts[name]!r:.80}; it must be {wanted}."
    return None


@dataclass(frozen=True, slots=True)
class ChatRow:
    """One training example: a conversation whose last message, the assistant's, is the target."""

    id: str
    task: str
    messages: tuple[Message, ...]
    weight: float = 1.0
    """Multiplies the loss of the target."""
    group: str = ""
    """What must not be shared between training and validation: the query, the user. Empty: what the row asks."""
    label: str | None = None
    """The true answer in the task's own words, for metrics; None where the task has none."""
    time: float | None = None
    """When what the target tells happened, in seconds since 1970, for splits by time; None where it has no time."""
    facts: Facts = field(default_factory=dict, hash=False)
    """What the prompt was rendered from, and the true answer: metrics, rewards and variants read these, not texts."""
    source: str = field(default="", compare=False)
    """Name of the source that it is of, by which results tell datasets apart; empty: unknown. No part of the row."""

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Everything before the target."""
        return self.messages[:-1]

    @property
    def target(self) -> str:
        """What the assistant should say, reasoning included."""
        return self.messages[-1].content

    def as_dict(self) -> dict[str, Any]:
        """Return the fields of a line of JSON that the source kind ``jsonl`` reads."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in ("id", "task", "group")}
        fields |= {"messages": [message.as_dict() for message in self.messages], "weight": self.weight}
        if self.label is not None:
            fields["label"] = str(self.label)
        if self.facts:
            fields["facts"] = {str(name): value for name, value in self.facts.items()}
        return fields

    def text_fact(self, name: Fact) -> str:
        """Return a fact that is a text.

        Raises:
            DataError: If the row has no such fact, or it is of another type.
        """
        value = self.facts.get(name)
        return value if isinstance(value, str) else self._refuse(name, "a text")

    def list_fact(self, name: Fact) -> tuple[str, ...]:
        """Return a fact that is a list of texts; raise as ``text_fact``."""
        value = self.facts.get(name)
        return tuple(value) if _are_texts(value) else self._refuse(name, "a list of texts")

    def object_fact(self, name: Fact) -> Facts:
        """Return a fact that is an object; raise as ``text_fact``."""
        value = self.facts.get(name)
        return value if isinstance(value, Mapping) else self._refuse(name, "an object")

    def _refuse(self, name: Fact, wanted: str) -> NoReturn:
        given = f"{self.facts[name]!r:.60} as" if name in self.facts else "no"
        raise DataError(f"row {self.id!r} of task {self.task} has {given} fact {str(name)!r}; it must be {wanted}.")

    def shown_texts(self) -> list[str]:
        """Return the texts of the facts that the prompt shows, without the words around them."""
        return [text for name in _SHOWN for text in texts_in(self.facts.get(name))]


def texts_in(value: JsonValue) -> Iterator[str]:
    """Yield the texts of a fact, however deep they are, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | Sequence):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from texts_in(item)


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """One training example in tokens. N tokens make N - 1 predictions."""

    id: str
    task: str
    tokens: NDArray[np.int32]
    """(N,): prompt, target, end token."""
    loss_weights: NDArray[np.float32]
    """(N,): weight of the loss of predicting each token; 0 for the prompt."""

    @property
    def predictions(self) -> int:
        """Positions the row occupies in a batch."""
        return len(self.tokens) - 1

    @property
    def target_count(self) -> int:
        """Predictions that count in the loss."""
        return int(np.count_nonzero(self.loss_weights[1:]))


class FittingRows(Sequence[TokenizedRow]):
    """Rows that were chosen because they fit into ``data.seq_length``: nobody need read all of them to know."""
