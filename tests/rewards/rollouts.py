"""Rollouts made of texts, for the tests of rewards."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_ads.config.rl import RewardConfig, RewardsConfig
from megatron_ads.rewards.registry import Rewards, open_rewards
from megatron_ads.rewards.scores import Scores
from megatron_ads.rollouts import Rollout
from megatron_ads.rows import ChatRow, Message, Role


def chat_row(row_id: str = "r", task: str = "chat", target: str = "yes", **fields: Any) -> ChatRow:
    messages = (Message(Role.user, f"Question {row_id}?"), Message(Role.assistant, target))
    return ChatRow(id=row_id, task=task, messages=messages, **fields)


def rollout(row: ChatRow, text: str, *, group: int = 0, log_p: float = -1.0) -> Rollout:
    return Rollout(
        row=row,
        group=group,
        prompt_tokens=(1, 2),
        answer_tokens=tuple(range(len(text))),
        text=text,
        cut_off=False,
        log_probabilities=(log_p,),
        weights="0",
    )


def answers(row: ChatRow, texts: Sequence[str], *, group: int = 0) -> list[Rollout]:
    return [rollout(row, text, group=group) for text in texts]


def rewards(name: str, settings: Mapping[str, Any] | None = None, *, timeout_seconds: float = 60.0) -> Rewards:
    use = [RewardConfig(name=name, settings=dict(settings or {}))]
    return open_rewards(RewardsConfig(use=use, timeout_seconds=timeout_seconds))


def values(name: str, rollouts: Sequence[Rollout], settings: Mapping[str, Any] | None = None) -> list[float]:
    """Return the values of a built-in reward."""
    found: list[float] = rewards(name, settings).score(rollouts).values[name].tolist()
    return found


def failures(scores: Scores) -> list[str]:
    """Return what failed, and why, of each rollout without a value because of that."""
    return [f"{each.fault}: {each.text}" for found in scores.failures.values() for each in found.values()]
