"""Agents of users and advertisers that learn from purchases: who chose wrongly reflects, and both memories change.

One lesson is a purchase: the user's agent is shown the advertiser that the user bought from and another one, drawn by
popularity, and chooses. After a wrong choice the memories of the user and of both advertisers are updated by a
reflection. In the end the user's agent ranks candidates. A round is the n-th lesson of every user; within it,
advertisers learn from one user after another.

Source: AgentCF (arXiv:2310.09233), sections 3.2 (autonomous interaction, collaborative reflection) and 3.3 (ranking).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from megatron_ads.config.user_simulation import AgentsConfig
from megatron_ads.downstream.logs import item_numbers
from megatron_ads.metrics.ranking import same_name
from megatron_ads.progress import Progress
from megatron_ads.tasks.user_history import CONVERSIONS
from megatron_ads.user_simulation.business import Business
from megatron_ads.user_simulation.recommenders import popularity


@dataclass(frozen=True, kw_only=True, slots=True)
class Lesson:
    """One purchase, and an advertiser that was not bought from."""

    user: int
    """Row of the user."""
    bought: int
    other: int
    bought_first: bool
    """Whether the agent is shown the one bought from first."""

    @property
    def shown(self) -> tuple[int, int]:
        """Return both advertisers, in the order in which they are shown."""
        return (self.bought, self.other) if self.bought_first else (self.other, self.bought)


@dataclass(frozen=True, slots=True)
class Exam:
    """Candidates that a user's agent ranks; the next purchase is one of them."""

    user: int
    candidates: tuple[int, ...]
    """In an order that says nothing."""
    bought: int


class Agents(Protocol):
    """All agents of users and advertisers, with their memories."""

    def choose(self, lessons: Sequence[Lesson]) -> list[int | None]:
        """Return the advertiser that each user's agent chooses; None: what it said cannot be read."""

    def reflect(self, mistakes: Sequence[Lesson]) -> None:
        """Update the memories after wrong choices; no two are of one user or share an advertiser."""

    def rank(self, exams: Sequence[Exam]) -> list[tuple[int, ...] | None]:
        """Return each user's candidates, the best first; None: what its agent said cannot be read."""


@dataclass(slots=True)
class Round:
    """What agents chose in the lessons of one round."""

    right: list[bool] = field(default_factory=list)
    """For each lesson whose choice could be read."""
    unreadable: int = 0


def rounds_of(business: Business, config: AgentsConfig) -> list[list[Lesson]]:
    """Return the lessons of each round: the users' latest purchases before the anchor, the oldest first."""
    draw, numbers = np.random.default_rng([config.seed, 5]), item_numbers(business.past.items)
    share_A = popularity(business) + 1.0
    rounds: list[list[Lesson]] = [[] for _ in range(config.purchases)]
    for user, name in enumerate(business.users.names):
        log = business.past.events[name]
        known = {numbers.get(same_name(event.advertiser)) for event in log}
        weight_A = np.array([0.0 if number in known else share for number, share in enumerate(share_A)])
        if not weight_A.any():
            continue  # who knows every advertiser cannot choose one not bought from
        bought = [numbers[same_name(event.advertiser)] for event in log if event.kind in CONVERSIONS]
        for number, advertiser in enumerate(bought[-config.purchases :]):
            other = int(draw.choice(len(weight_A), p=weight_A / weight_A.sum()))
            first = bool(draw.random() < 0.5)
            rounds[number].append(Lesson(user=user, bought=advertiser, other=other, bought_first=first))
    return [lessons for lessons in rounds if lessons]


def exams_of(business: Business, config: AgentsConfig) -> list[Exam]:
    """Return one exam a user: the next purchase among advertisers drawn by popularity."""
    draw, share_A = np.random.default_rng([config.seed, 6]), popularity(business) + 1.0
    exams = []
    for user, bought in enumerate(business.next_bought):
        assert bought is not None, "users were chosen so"
        weight_A = np.where(np.arange(len(share_A)) == bought, 0.0, share_A)
        count = min(config.candidates, len(share_A)) - 1
        others = draw.choice(len(weight_A), size=count, replace=False, p=weight_A / weight_A.sum())
        exams.append(Exam(user, tuple(draw.permutation([bought, *others]).tolist()), bought))
    return exams


def learn(agents: Agents, rounds: Sequence[Sequence[Lesson]]) -> list[Round]:
    """Have agents choose and reflect, round after round; return what they chose."""
    seen = []
    with Progress(sum(map(len, rounds)), description="learning", unit="purchase") as progress:
        for lessons in rounds:
            found, mistakes = Round(), []
            for lesson, chosen in zip(lessons, agents.choose(lessons), strict=True):
                if chosen is None:
                    found.unreadable += 1
                    continue
                found.right.append(chosen == lesson.bought)
                if chosen != lesson.bought:
                    mistakes.append(lesson)
            for apart in without_shared_advertisers(mistakes):
                agents.reflect(apart)
            seen.append(found)
            progress.update(len(lessons))
    return seen


def without_shared_advertisers(lessons: Sequence[Lesson]) -> Iterator[list[Lesson]]:
    """Yield the lessons in groups in which no advertiser is in two; those of an advertiser keep their order."""
    waiting = list(lessons)
    while waiting:
        taken: set[int] = set()
        group: list[Lesson] = []
        later: list[Lesson] = []
        for lesson in waiting:
            both = {lesson.bought, lesson.other}
            (later if both & taken else group).append(lesson)
            taken |= both  # also of one that waits: a later lesson of its advertisers waits, too
        yield group
        waiting = later
