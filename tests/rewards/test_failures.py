"""When failing rewards end a run, and when they cost no more than the answers that they happened to."""

from collections.abc import Sequence

import pytest

from megatron_ads.errors import DataError
from megatron_ads.rewards.failures import RewardHistory, log_failures
from megatron_ads.rewards.reward import Fault, Outcome, RewardFailure
from megatron_ads.rewards.scores import Scores, joined, scores_of
from megatron_ads.rollouts import Rollout
from tests.rewards.rollouts import answers, chat_row

RAISED = RewardFailure(Fault.raised, "ValueError: no good")
UNTRUE = RewardFailure(Fault.not_finite, "nan is no finite number")


def step(*prompts: int) -> list[Rollout]:
    """Return rollouts of prompts that have so many answers each."""
    return [
        each
        for group, count in enumerate(prompts)
        for each in answers(chat_row(f"r{group}"), ["x"] * count, group=group)
    ]


def ends_run(history: RewardHistory, rollouts: Sequence[Rollout], scores: Scores) -> bool:
    try:
        history.require_values(rollouts, scores)
    except DataError:
        return True
    return False


def outcomes(*counts: tuple[Outcome, int]) -> list[Outcome]:
    return [outcome for outcome, count in counts for _ in range(count)]


def test_failures_are_told_in_one_line_by_reward_and_counted_by_fault(caplog: pytest.LogCaptureFixture) -> None:
    scores = scores_of({"a": [1.0, RAISED, None, UNTRUE, RAISED], "b": [1.0] * 5})
    log_failures(scores)
    (line,) = (record.getMessage() for record in caplog.records)
    assert line == "The reward a failed for 3 of 5 rollouts (2 raised, 1 not_finite; ValueError: no good)."
    assert scores.faults == {"a/raised": 2, "a/not_finite": 1}


def test_scores_of_draws_are_joined_in_their_order() -> None:
    found = joined([scores_of({"a": [1.0, RAISED]}), scores_of({"a": [UNTRUE, 2.0]})])
    assert found.values["a"][[0, 3]].tolist() == [1.0, 2.0]
    assert found.failures == {"a": {1: RAISED, 2: UNTRUE}}


@pytest.mark.parametrize(
    ("prompts", "found"),
    [
        ([4, 2], {"a": outcomes((1.0, 4), (RAISED, 2))}),  # what a second draw brought
        ([10, 20, 8], {"a": outcomes((None, 30), (RAISED, 8))}),  # the only prompt of its task
        ([4, 4], {"a": outcomes((RAISED, 4), (None, 4)), "b": outcomes((None, 4), (0.5, 4))}),
        ([4, 4], {"a": outcomes((None, 8))}),
    ],
    ids=["redrawn", "one prompt of its task", "two tasks", "declined"],
)
def test_what_fails_for_one_prompt_ends_no_run(prompts: Sequence[int], found: dict[str, list[Outcome]]) -> None:
    assert not ends_run(RewardHistory(), step(*prompts), scores_of(found))


@pytest.mark.parametrize(
    ("prompts", "found", "said"),
    [
        ([2], {"a": [RAISED, UNTRUE]}, r"a failed for 2 of 2 rollouts \(1 raised, 1 not_finite; ValueError: no"),
        ([2, 2], {"a": [None, None, RAISED, RAISED], "b": [RAISED, UNTRUE, RAISED, None]}, "b failed for 3 of 4"),
        ([2, 2, 2], {"a": outcomes((None, 2), (RAISED, 4))}, r"a failed for 4 of 6 rollouts \(4 raised; "),
    ],
    ids=["all", "all by two rewards", "two prompts of its task"],
)
def test_a_step_in_which_rewards_fail_and_have_no_value_ends_a_run_whatever_was_before(
    prompts: Sequence[int], found: dict[str, list[Outcome]], said: str
) -> None:
    history = RewardHistory()
    history.load_state_dict(["a", "b"])
    with pytest.raises(DataError, match=rf"^The reward {said}.* and has a value for none\. Correct it"):
        history.require_values(step(*prompts), scores_of(found))


BROKEN = scores_of({"a": outcomes((1.0, 4)), "b": outcomes((RAISED, 4))})
GOOD = scores_of({"a": outcomes((1.0, 4)), "b": outcomes((RAISED, 3), (0.0, 1))})


def test_a_reward_that_has_had_a_value_may_fail_for_steps_also_after_a_restart() -> None:
    scored, trained, continued = RewardHistory(), RewardHistory(), RewardHistory()
    assert not ends_run(scored, step(2, 2), GOOD)
    trained.observe(GOOD.values)  # from file
    continued.load_state_dict(trained.state_dict())
    for history in (scored, trained, continued):
        assert [ends_run(history, step(2, 2), BROKEN) for _ in range(2)] == [False, False]
    assert ends_run(RewardHistory(), step(2, 2), BROKEN)


def test_a_reward_that_never_had_a_value_ends_the_run_at_its_second_prompt() -> None:
    said = r"reward b failed for 4 of 4 .* and has a value for none, nor has it had one before in this run\. Correct"
    with pytest.raises(DataError, match=said):
        RewardHistory().require_values(step(2, 2), BROKEN)
    history = RewardHistory()
    rare: Scores = scores_of({"a": outcomes((1.0, 4)), "b": outcomes((None, 2), (RAISED, 2))})
    rollouts = step(2, 2)
    assert [ends_run(history, rollouts, rare) for _ in range(2)] == [False, False]  # the same prompt again
    with pytest.raises(DataError, match="reward b failed for 2 of 4"):
        history.require_values(step(2, 0, 2), rare)
