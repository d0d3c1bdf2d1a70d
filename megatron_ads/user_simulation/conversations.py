"""Conversations: an assistant searches, asks back or recommends; the user answers; both are bounded in turns and calls.

A turn is what the assistant says to the user, a question or a recommendation, and the user's reply. Before it the
assistant may call its only tool, the retriever of the frozen pipeline, which leaves out what was recommended before.

Source: Chat-Rec (arXiv:2303.14524): a language model over a recommender that it calls, explains and refines.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from megatron_ads.config.user_simulation import ConverseConfig
from megatron_ads.progress import Progress
from megatron_ads.tasks.user_history import UserHistory
from megatron_ads.user_simulation.business import Business
from megatron_ads.user_simulation.talking_users import TalkingUsers, Topic

FOUND = 10
"""Most advertisers that a search finds."""


@dataclass(frozen=True, slots=True)
class Search:
    """A call of the retriever."""

    query: str
    found: tuple[int, ...] = ()
    """What it found, once it was carried out."""


@dataclass(frozen=True, slots=True)
class ClarifyingQuestion:
    """Asks the user back."""

    about: Topic
    text: str


@dataclass(frozen=True, slots=True)
class Recommendation:
    """Shows advertisers, the best first, and says why."""

    shown: tuple[int, ...]
    why: str


@dataclass(frozen=True, slots=True)
class Said:
    """What the user said."""

    text: str


@dataclass(frozen=True, slots=True)
class Breakdown:
    """The assistant did nothing that can be carried out: the conversation is over."""

    why: str


Act = Search | ClarifyingQuestion | Recommendation | Breakdown
Step = Act | Said


@dataclass(slots=True)
class Conversation:
    """One user with one assistant."""

    user: int
    """Row of the user."""
    steps: list[Step] = field(default_factory=list)
    success: int | None = None
    """Turn, from 1, in which the user was shown its goal; None: in none."""
    turns: int = 0
    """Questions and recommendations so far."""

    @property
    def recommended(self) -> set[int]:
        """Return every advertiser shown so far."""
        return {number for step in self.steps if isinstance(step, Recommendation) for number in step.shown}

    @property
    def calls(self) -> int:
        """Return how often the retriever was called since the user spoke last."""
        count = 0
        for step in reversed(self.steps):
            if isinstance(step, Said):
                break
            count += isinstance(step, Search)
        return count

    @property
    def found(self) -> set[int]:
        """Return every advertiser that a search of this conversation found, and that was not shown yet."""
        everything = {number for step in self.steps if isinstance(step, Search) for number in step.found}
        return everything - self.recommended

    @property
    def breakdown(self) -> str | None:
        """Return why the assistant could not go on, if so."""
        last = self.steps[-1]
        return last.why if isinstance(last, Breakdown) else None


class Assistant(Protocol):
    """Who talks to users."""

    def act(self, conversations: Sequence[Conversation]) -> list[Act]:
        """Return the next thing it does in each conversation; the user spoke last, or a search was carried out."""


Retriever = Callable[[int, str, set[int]], tuple[int, ...]]
"""Takes the row of a user, a query, and what to leave out; returns at most ``FOUND`` advertisers, the best first."""


def pipeline_retriever(business: Business, *, history: bool) -> Retriever:
    """Return the frozen pipeline's retriever, with the user's history or with the query alone."""

    def search(user: int, query: str, shown: set[int]) -> tuple[int, ...]:
        known = business.histories[user] if history else UserHistory(user_id=business.users.names[user])
        best = business.pipeline.retrieve(business.pipeline.users([known], [query]), FOUND + len(shown))[0].tolist()
        return tuple(number for number in best if number not in shown)[:FOUND]

    return search


def converse(
    assistant: Assistant, users: TalkingUsers, retriever: Retriever, count: int, config: ConverseConfig, *, name: str
) -> list[Conversation]:
    """Return one conversation of each of the first ``count`` users; those that go on are at the same step."""
    conversations = [Conversation(user, [Said(users.opening(user))]) for user in range(count)]
    going = conversations
    with Progress(count, description=f"talking, {name}", unit="conversation") as progress:
        while going:
            for one, act in zip(going, assistant.act(going), strict=True):
                _carry_out(one, act, users, retriever, config)
            still = [one for one in going if not _is_over(one, config)]
            progress.update(len(going) - len(still))
            going = still
    return conversations


def _is_over(one: Conversation, config: ConverseConfig) -> bool:
    return one.success is not None or one.turns >= config.turns or one.breakdown is not None


def _carry_out(one: Conversation, act: Act, users: TalkingUsers, retriever: Retriever, config: ConverseConfig) -> None:
    """Append what the assistant did and what came of it."""
    match act:
        case Search(query=query):
            if one.calls >= config.calls:
                one.steps.append(Breakdown("too_many_calls"))
            else:
                one.steps.append(Search(query, retriever(one.user, query, one.recommended)))
        case ClarifyingQuestion(about=about):
            one.turns += 1
            one.steps += [act, Said(users.answer(one.user, about))]
        case Recommendation(shown=shown):
            one.turns += 1
            accepted, text = users.reply(one.user, shown)
            one.steps += [act, Said(text)]
            one.success = one.turns if accepted else None
        case Breakdown():
            one.steps.append(act)
