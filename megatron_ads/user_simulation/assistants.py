"""Who talks to users: fixed rules, with and without questions, and a language model with the retriever as its tool."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from megatron_ads.config.user_simulation import ConverseConfig
from megatron_ads.downstream.logs import Item
from megatron_ads.inference.engine import Completion
from megatron_ads.rows import Message, Role
from megatron_ads.user_simulation.conversations import (
    Act,
    Breakdown,
    ClarifyingQuestion,
    Conversation,
    Recommendation,
    Said,
    Search,
    Step,
)
from megatron_ads.user_simulation.model_answers import UnreadableError, list_of, one_of, read_object, text
from megatron_ads.user_simulation.players import Player
from megatron_ads.user_simulation.talking_users import WRONG_PRICE, Topic

_LONGEST_TEXT = 600
_TRAITS = 4
"""Lines of an advertiser's text that a search shows."""
_SEARCH = "search"

QUESTIONS: Mapping[Topic, str] = {
    Topic.shop: "Where did you buy before?",
    Topic.price: "How much would you like to spend?",
    Topic.place: "Where do you live?",
    Topic.product: "What exactly do you mean?",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RulesAssistant:
    """Searches for what the user said and recommends what it finds; at some turns it asks instead.

    It listens for the opening, answers, and complaints about the price; other words of complaints find nothing.
    """

    shown: int
    """Advertisers of a recommendation."""
    asks: Mapping[int, Topic]
    """What it asks at which turn, from 1."""
    listens: bool = True
    """Whether it searches for answers and complaints, too, and not for the opening alone."""

    def act(self, conversations: Sequence[Conversation]) -> list[Act]:
        """Return the next thing it does in each conversation."""
        return [self._act(one) for one in conversations]

    def _act(self, one: Conversation) -> Act:
        if (topic := self.asks.get(one.turns + 1)) is not None:
            return ClarifyingQuestion(topic, QUESTIONS[topic])
        last = one.steps[-1]
        if isinstance(last, Search):
            return Recommendation(last.found[: self.shown], "These fit best what you said.")
        heard = list(_heard(one)) if self.listens else []
        return Search(" ".join([_text_of(one.steps[0]), *dict.fromkeys(heard)]))


_COMPLAINTS = dict(zip(WRONG_PRICE, ("cheap", "premium"), strict=True))
"""What is searched for after a complaint."""


def _heard(one: Conversation) -> Iterator[str]:
    """Yield what to search for besides the opening."""
    for before, step in pairwise(one.steps):
        if isinstance(step, Said) and isinstance(before, ClarifyingQuestion):
            yield step.text
        elif isinstance(step, Said):
            yield from (word for complaint, word in _COMPLAINTS.items() if complaint in step.text)


def _text_of(step: Step) -> str:
    assert isinstance(step, Said), "the user opens"
    return step.text


_PROTOCOL = """You help a user to find an advertiser to buy from. Answer with one JSON object and nothing else:
{{"call": "search", "query": "words"}} finds advertisers; at most {calls} in a row.
{{"ask": "a question", "about": "product"}} asks the user; about is one of {topics}.
{{"recommend": ["name"], "why": "an explanation"}} shows at most {shown} advertisers that a search has found.
You have {turns} turns; each question and each recommendation takes one."""


class LanguageAssistant:
    """A language model; what it says is read strictly, and its only tool is the search."""

    def __init__(self, player: Player, items: Sequence[Item], config: ConverseConfig) -> None:
        self._player, self._items, self._config = player, items, config
        self._numbers = {item.name: number for number, item in enumerate(items)}
        self._protocol = _PROTOCOL.format(
            calls=config.calls, topics=", ".join(Topic), shown=config.shown, turns=config.turns
        )

    def act(self, conversations: Sequence[Conversation]) -> list[Act]:
        """Return the next thing that the model does in each conversation."""
        said = self._player.say([self.messages(one) for one in conversations])
        return [self.read(one, completion) for one, completion in zip(conversations, said, strict=True)]

    def messages(self, one: Conversation) -> list[Message]:
        """Return a conversation as the model sees it: what it said itself is in the form that it is asked for."""
        first, *others = [message for step in one.steps for message in self._messages(step)]
        return [Message(Role.user, f"{self._protocol}\n\nUser: {first.content}"), *others]

    def _messages(self, step: Step) -> list[Message]:
        match step:
            case Said(text=said):
                return [Message(Role.user, said)]
            case Search(query=query, found=found):
                listed = "\n".join(map(self._described, found)) or "nothing"
                return [_own({"call": _SEARCH, "query": query}), Message(Role.user, f"Found:\n{listed}")]
            case ClarifyingQuestion(about=about, text=asked):
                return [_own({"ask": asked, "about": str(about)})]
            case Recommendation(shown=shown, why=why):
                return [_own({"recommend": [self._items[number].name for number in shown], "why": why})]
            case Breakdown(why=why):
                raise AssertionError(f"over after {why}")

    def _described(self, number: int) -> str:
        item = self._items[number]
        return f"{item.name} ({', '.join(item.text.splitlines()[:_TRAITS])})"

    def read(self, one: Conversation, said: Completion) -> Act:
        """Return what the model wants to do: one of three forms, with known tools, topics and names alone."""
        names = {self._items[number].name for number in one.found}
        forms = [
            {"call": one_of([_SEARCH]), "query": text(_LONGEST_TEXT)},
            {"ask": text(_LONGEST_TEXT), "about": one_of(list(Topic))},
            {
                "recommend": list_of(one_of(names), least=1, most=self._config.shown),
                "why": text(_LONGEST_TEXT),
            },
        ]
        try:
            found = read_object(said, forms)
        except UnreadableError as error:
            return Breakdown(str(error))
        if "call" in found:
            return Search(found["query"])
        if "ask" in found:
            return ClarifyingQuestion(Topic(found["about"]), found["ask"])
        return Recommendation(tuple(self._numbers[name] for name in found["recommend"]), found["why"])


def _own(act: Mapping[str, object]) -> Message:
    return Message(Role.assistant, json.dumps(act, ensure_ascii=False))
