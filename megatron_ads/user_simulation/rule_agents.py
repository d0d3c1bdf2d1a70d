"""Agents by fixed rules, which understand no language: memories count traits, a reflection is a perceptron's step.

    score(u, a) = sum of u's weights of a's traits + sum of a's weights of u's traits

Traits of an advertiser are its name and the lines of its text; those of a user are what its profile says. After a wrong
choice the user adds 1 to the traits that only the advertiser bought from has, and subtracts 1 from those that only the
other has; the two advertisers add and subtract 1 for the user's traits.
"""

from collections import Counter
from collections.abc import Sequence

from megatron_ads.user_simulation.agents import Exam, Lesson
from megatron_ads.user_simulation.business import Business


class RuleAgents:
    """All agents of a business; memories begin empty."""

    def __init__(self, business: Business) -> None:
        self._of_item = [frozenset({item.name, *item.text.splitlines()}) for item in business.past.items]
        about = [history.demographics for history in business.histories]
        self._of_user = [frozenset(filter(None, (each.age, each.gender, each.state))) for each in about]
        self._users: list[Counter[str]] = [Counter() for _ in self._of_user]
        self._items: list[Counter[str]] = [Counter() for _ in self._of_item]

    def choose(self, lessons: Sequence[Lesson]) -> list[int | None]:
        """Return the advertiser of the higher score; of equal ones the one shown first."""
        return [self._better(lesson.user, *lesson.shown) for lesson in lessons]

    def _better(self, user: int, first: int, second: int) -> int:
        return second if self._score(user, second) > self._score(user, first) else first

    def reflect(self, mistakes: Sequence[Lesson]) -> None:
        """Update the memories."""
        for lesson in mistakes:
            bought, other, user = self._of_item[lesson.bought], self._of_item[lesson.other], self._of_user[lesson.user]
            self._users[lesson.user].update(bought - other)
            self._users[lesson.user].subtract(other - bought)
            self._items[lesson.bought].update(user)
            self._items[lesson.other].subtract(user)

    def rank(self, exams: Sequence[Exam]) -> list[tuple[int, ...] | None]:
        """Return the candidates by their scores; equal ones keep their order."""
        return [self._ordered(exam) for exam in exams]

    def _ordered(self, exam: Exam) -> tuple[int, ...]:
        return tuple(sorted(exam.candidates, key=lambda item: -self._score(exam.user, item)))

    def _score(self, user: int, item: int) -> int:
        of_user, of_item = self._users[user], self._items[item]
        return sum(of_user[trait] for trait in self._of_item[item]) + sum(of_item[each] for each in self._of_user[user])
