"""Advantages of groups against numbers worked out by hand."""

from typing import Any

import numpy as np
import pytest

from megatron_ads.config.rl import PolicyConfig
from megatron_ads.losses.advantages import group_advantages, teacher_advantages, without_variance

NAN = float("nan")


# Rewards 1, 0, 0, 1: differences of 1/2 from the mean, unbiased std sqrt(4 (1/2)^2 / 3) = 0.5773503, so
# 0.5 / (0.5773503 + 1e-6) = 0.8660239. The others of a 1 have the mean 1/3: 1 - 1/3 = 2/3; those of a 0 have 2/3.
@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({}, 0.8660239),
        ({"norm_adv_by_std": False}, 0.5),
        ({"norm_adv_by_std": False, "leave_one_out": True}, 2 / 3),
        ({"leave_one_out": True}, 0.6666667 / 0.5773513),
    ],
    ids=str,
)
def test_an_answer_is_compared_with_its_group(settings: dict[str, Any], size: float) -> None:
    rewards = np.array([1, 0, 0, 1], dtype=np.float32)
    found = group_advantages(rewards, np.zeros(4, dtype=int), PolicyConfig(**settings))
    assert found.dtype == np.float64
    assert found == pytest.approx([size, -size, -size, size], rel=1e-6)


# Group 7: 3 and 1, the mean is 2 and the std sqrt(2). 3 x 0.1 is not 0.3 in floating point, yet group 2 has advantages
# of exactly 0. Group 4 has one reward and group 5 none.
REWARDS = np.array([0.1, 3, 0.1, NAN, 0.1, 1, 5, NAN, NAN])
GROUPS = np.array([2, 7, 2, 7, 2, 7, 4, 4, 5])


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_what_has_no_reward_is_in_no_group_and_equal_rewards_teach_nothing(leave_one_out: bool) -> None:
    config = PolicyConfig(leave_one_out=leave_one_out)
    size = (2 if leave_one_out else 1) / (2**0.5 + 1e-6)
    assert group_advantages(REWARDS, GROUPS, config).tolist() == pytest.approx([0, size, 0, 0, 0, -size, 0, 0, 0])
    assert (group_advantages(REWARDS, GROUPS, config) == 0).sum() == 7


def test_groups_without_variance_are_named() -> None:
    assert without_variance(REWARDS, GROUPS) == [2, 4, 5]


def test_a_token_is_worth_what_the_teacher_finds_it_likelier_than_the_policy_does() -> None:
    # log p_teacher - log p_student: ln 0.5 - ln 0.25 = ln 2; ln 0.1 - ln 0.8 = -ln 8; 0 where both say 0.9. Times 0.5.
    teacher, old = np.log([0.5, 0.1, 0.9]), np.log([0.25, 0.8, 0.9]).astype(np.float32)
    found = teacher_advantages(teacher.tolist(), old, 0.5)
    assert found.dtype == np.float32
    assert found.tolist() == pytest.approx([0.3465736, -1.0397208, 0.0], rel=1e-6, abs=1e-7)
    assert teacher_advantages(None, old, 0.5).tolist() == [0, 0, 0]
