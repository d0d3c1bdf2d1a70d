"""From the states of the ranks to the cause, case by case. Groups: everybody, and the pairs of two stages."""

import pytest

from megatron_ads.layout import ParallelLayout
from megatron_ads.runtime.health.activity import RankState, Wait
from megatron_ads.runtime.health.report import Findings, HangReport, find

WORLD = 4


def _wait(channel: str, number: int, *ranks: int, call: str = "allreduce(float32[3]; sum)") -> Wait:
    signature = "" if ">" in channel else call
    return Wait(call, f"{channel}{list(ranks)}", list(ranks), channel, number, signature)


def _in(wait: Wait, **calls: int) -> RankState:
    return RankState(phase="step 7", idle_seconds=30, wait=wait, calls={wait.channel: wait.number} | calls, stack=["a"])


def _outside(idle: float = 30.0, **calls: int) -> RankState:
    return RankState(phase="step 7", idle_seconds=idle, wait=None, calls=calls, stack=["train.py:9 in work"])


def _report(states: dict[int, RankState]) -> tuple[Findings, str]:
    findings = find(states, WORLD)
    layout = ParallelLayout(world=WORLD, pp=2, ep=2)
    report = HangReport(asked_by=0, seconds=30, layout=layout, findings=findings, states=states, places={})
    assert len(report.as_json()["ranks"]) == WORLD
    return findings, report.text()


def test_of_a_chain_of_waiting_ranks_the_one_at_its_end_is_the_cause() -> None:
    # 0 waits for a message of 2, 2 for 3 in their pair, 1 for everybody; 3 is in neither.
    findings, text = _report(
        {
            0: _in(_wait("2>0", 5, 2, 0)),
            1: _in(_wait("all", 9, 0, 1, 2, 3)),
            2: _in(_wait("pair", 4, 2, 3), **{"2>0": 4}),
            3: _outside(pair=3, all=8),
        }
    )
    assert findings.culprits == [3]
    assert findings.waits_for == {0: [2], 1: [0, 2, 3], 2: [3]}
    assert text.startswith(
        "the job hangs: rank 3 (stage 1) is not in a communication but at train.py:9 in work, 30.0 s"
    )
    assert "waiting for it: rank 2 (stage 1) in allreduce(float32[3]; sum) of pair[2, 3]" in text


def test_who_does_not_answer_is_the_cause_only_where_others_wait_for_it() -> None:
    states = {0: _in(_wait("pair", 4, 0, 1)), 1: _outside(pair=3), 2: _outside(0.1)}
    findings, _ = _report(states)
    assert (findings.culprits, findings.silent) == ([1], [3])
    findings, text = _report(states | {1: _in(_wait("other", 2, 1, 3), pair=3)})
    assert (findings.culprits, findings.silent) == ([3], [3])
    assert "rank 3 (stage 1) does not answer; waiting for it: rank 1 (stage 0) in allreduce" in text


def test_on_a_gpu_a_rank_is_held_up_by_the_call_before() -> None:
    """Hosts have launched everything; rank 1's stream is still before call 9, in one that rank 3 has not launched."""
    findings, _ = _report(
        {
            0: _in(_wait("all", 9, 0, 1, 2)),
            1: _in(_wait("pair", 2, 1, 3), all=9),
            2: _in(_wait("all", 9, 0, 1, 2)),
            3: _outside(pair=1),
        }
    )
    assert findings.culprits == [3]
    assert findings.waits_for == {0: [1], 1: [3], 2: [1]}


def test_members_that_make_different_calls_are_told_apart() -> None:
    others = {rank: _in(_wait("all", 9, 0, 1, 2, 3)) for rank in range(3)}
    findings, text = _report({**others, 3: _in(_wait("all", 9, 0, 1, 2, 3, call="allreduce(float32[4]; sum)"))})
    assert findings.culprits == []
    assert text.splitlines()[0] == (
        "the job hangs: ranks of one group made different calls: ranks 0-2: allreduce(float32[3]; sum) of "
        "all[0, 1, 2, 3], but rank 3: allreduce(float32[4]; sum) of all[0, 1, 2, 3]"
    )


def test_a_circle_is_found_behind_the_ranks_that_lead_into_it() -> None:
    findings, text = _report(
        {
            0: _in(_wait("all", 1, 0, 1)),
            1: _in(_wait("2>1", 1, 2, 1)),
            2: _in(_wait("3>2", 1, 3, 2)),
            3: _in(_wait("1>3", 1, 1, 3)),
        }
    )
    assert sorted(findings.circle) == [1, 2, 3]
    assert "wait for each other in a circle" in text


def test_when_all_have_made_the_same_call_it_is_the_network() -> None:
    findings, text = _report({rank: _in(_wait("all", 9, 0, 1, 2, 3)) for rank in range(WORLD)})
    assert (findings.culprits, findings.circle, findings.disagreements) == ([], [], [])
    assert "in communication that every member has come to" in text


@pytest.mark.parametrize("busy", [2, 3])
def test_where_nobody_waits_those_that_stand_still_are_named(busy: int) -> None:
    states = {rank: _outside(0.2 if rank == busy else 30.0) for rank in range(WORLD)}
    assert _report(states)[0].culprits == [rank for rank in range(WORLD) if rank != busy]
