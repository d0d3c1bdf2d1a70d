"""Agents played by a language model, whose memories are texts that it writes itself; what it says is read strictly.

Source: AgentCF (arXiv:2310.09233); the prompts are ours.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_ads.config.user_simulation import AgentsConfig
from megatron_ads.rows import Message, Role
from megatron_ads.user_simulation.agents import Exam, Lesson
from megatron_ads.user_simulation.business import Business
from megatron_ads.user_simulation.model_answers import Reader, UnreadableError, list_of, read_object, text, whole_number
from megatron_ads.user_simulation.players import Player

_TRAITS, _LONGEST_TEXT = 4, 4000
_ONLY = "Answer with one JSON object and nothing else, such as\n"


class LanguageAgents:
    """All agents of a business."""

    def __init__(self, player: Player, business: Business, config: AgentsConfig) -> None:
        """Give every agent its first memory: of a user the profile, of an advertiser what it sells."""
        self._player, self._longest = player, config.memory_characters
        self._names = [item.name for item in business.past.items]
        profiles = [history.demographics for history in business.histories]
        self.users = [
            f"I am {', '.join(filter(None, (each.age, each.gender, each.state))) or 'somebody'}." for each in profiles
        ]
        self.items = [", ".join(item.text.splitlines()[:_TRAITS]) for item in business.past.items]
        self.unreadable_reflections = 0

    def choose(self, lessons: Sequence[Lesson]) -> list[int | None]:
        """Return the advertiser that the model chooses for each user."""
        prompts = [
            f"You play a user. Your memory: {self.users[lesson.user]}\nWhich of these advertisers do you buy from?\n"
            f"{self._listed(lesson.shown)}\n{_ONLY}" + '{"choice": 1, "why": "a reason"}'
            for lesson in lessons
        ]
        found = self._ask(prompts, {"choice": whole_number(1, 2), "why": text(_LONGEST_TEXT)})
        return [
            None if said is None else lesson.shown[said["choice"] - 1]
            for lesson, said in zip(lessons, found, strict=True)
        ]

    def reflect(self, mistakes: Sequence[Lesson]) -> None:
        """Have the model write the memories anew; one that cannot be read is kept as it was."""
        of_users = self._ask([self._user_reflection(lesson) for lesson in mistakes], {"memory": text(_LONGEST_TEXT)})
        form = {"first": text(_LONGEST_TEXT), "second": text(_LONGEST_TEXT)}
        of_items = self._ask([self._item_reflection(lesson) for lesson in mistakes], form)
        for lesson, of_user, of_both in zip(mistakes, of_users, of_items, strict=True):
            if of_user is not None:
                self.users[lesson.user] = of_user["memory"][: self._longest]
            if of_both is not None:
                self.items[lesson.bought] = of_both["first"][: self._longest]
                self.items[lesson.other] = of_both["second"][: self._longest]
            self.unreadable_reflections += (of_user is None) + (of_both is None)

    def rank(self, exams: Sequence[Exam]) -> list[tuple[int, ...] | None]:
        """Return each user's candidates as the model orders them: all of them, each once."""
        prompts = [
            f"You play a user. Your memory: {self.users[exam.user]}\nOrder these advertisers by how likely you buy "
            f"from them next, the likeliest first.\n{self._listed(exam.candidates)}\n{_ONLY}" + '{"order": [2, 1, 3]}'
            f"\nwith each of the numbers 1 to {len(exam.candidates)}."
            for exam in exams
        ]  # fmt: skip
        most = max(len(exam.candidates) for exam in exams)
        orders = self._ask(prompts, {"order": list_of(whole_number(1, most), most=most)})
        found: list[tuple[int, ...] | None] = []
        for exam, said in zip(exams, orders, strict=True):
            places = () if said is None else said["order"]
            whole = sorted(places) == list(range(1, len(exam.candidates) + 1))
            found.append(tuple(exam.candidates[place - 1] for place in places) if whole else None)
        return found

    def _listed(self, numbers: Sequence[int]) -> str:
        return "\n".join(
            f"{place}. {self._names[number]}: {self.items[number]}" for place, number in enumerate(numbers, start=1)
        )

    def _user_reflection(self, lesson: Lesson) -> str:
        both = (lesson.bought, lesson.other)
        return (
            f"You play a user. Your memory: {self.users[lesson.user]}\nYou chose advertiser 2 of these and were wrong: "
            f"you bought from advertiser 1.\n{self._listed(both)}\nWrite your memory anew, in at most {self._longest} "
            f"characters: what you like, and what you do not. {_ONLY}" + '{"memory": "I like ..."}'
        )

    def _item_reflection(self, lesson: Lesson) -> str:
        both = (lesson.bought, lesson.other)
        return (
            f"You play two advertisers.\n{self._listed(both)}\nA user chose 2 and was wrong, and bought from 1. Of the "
            f"user is known: {self.users[lesson.user]}\nWrite what each of you should say of itself, and of who buys "
            f"there, in at most {self._longest} characters. {_ONLY}" + '{"first": "...", "second": "..."}'
        )

    def _ask(self, prompts: Sequence[str], form: Mapping[str, Reader]) -> list[dict[str, Any] | None]:
        found: list[dict[str, Any] | None] = []
        for said in self._player.say([[Message(Role.user, prompt)] for prompt in prompts]):
            try:
                found.append(read_object(said, [form]))
            except UnreadableError:
                found.append(None)
        return found
