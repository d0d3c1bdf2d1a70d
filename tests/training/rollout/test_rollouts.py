"""How rollouts are made and divided: chunks, journals, prompts, files of steps, rows of an update."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ads.config.generation import GenerationConfig
from megatron_ads.config.recipes import load_job
from megatron_ads.config.rl import RlConfig
from megatron_ads.errors import DataError
from megatron_ads.inference.engine import Completion, Finish
from megatron_ads.rewards.scores import Scores
from megatron_ads.rollouts import Rollout
from megatron_ads.rows import ChatRow, Message, Role
from megatron_ads.training.policy_rows import minibatches, on_labels, policy_row
from megatron_ads.training.rollout.collect import Collector
from megatron_ads.training.rollout.dump import ScoredStep, read_header, read_recorded, step_file, write_step
from megatron_ads.training.rollout.generation import AnswerChunk, AnswerSettings, _rollout, cut
from megatron_ads.training.rollout.metrics import PhaseTimes, combined
from megatron_ads.training.rollout.prompts import PolicyPrompt, Prompts, PromptStream
from parity_tests.harness.ranks import run_ranks


def prompt(name: str) -> PolicyPrompt:
    row = ChatRow(name, "task", (Message(Role.user, name), Message(Role.assistant, "yes")))
    return PolicyPrompt(row=row, tokens=(1, 2, ord(name[0])), opened="")


def rollout(group: int, answer: Sequence[int] = (7, 8), *, name: str = "a") -> Rollout:
    return Rollout(
        row=prompt(name).row,
        group=group,
        prompt_tokens=(1, 2, 3),
        answer_tokens=tuple(answer),
        text="said",
        cut_off=False,
        log_probabilities=tuple(-0.1 * token for token in answer),
        weights="0-abc",
    )


def test_groups_stay_whole_where_they_fit_and_no_chunk_is_larger_than_allowed() -> None:
    assert cut(5, 4, 8) == [AnswerChunk(range(2), 4), AnswerChunk(range(2, 4), 4), AnswerChunk(range(4, 5), 4)]
    assert cut(2, 5, 2) == [AnswerChunk(range(n, n + 1), part) for n in (0, 1) for part in (2, 2, 1)]


def test_prompts_continue_where_the_state_was_taken_and_only_among_the_same_prompts() -> None:
    def stream(names: str, seed: int = 3) -> PromptStream:
        return PromptStream([[prompt(name) for name in names]], ["here"], [1.0], seed)

    one, other = stream("abcdefg"), stream("abcdefg")
    first = one.draw(5)
    other.load_state_dict(one.state_dict())
    assert one.draw(9) == other.draw(9)
    assert len({each.row.id for each in first}) == 5
    for different, said in (
        (stream("abcdefh"), "other content in source 0"),
        (stream("abcdefg", seed=4), "seed 3, this job has 4"),
    ):
        with pytest.raises(DataError, match=said):
            different.load_state_dict(one.state_dict())


class Counting:
    """An engine whose answers tell the seed and which fails at its second call."""

    def __init__(self, fails: bool) -> None:
        self.calls, self.fails = 0, fails

    def generate(self, prompts: Sequence[Sequence[int]], config: GenerationConfig, **_: Any) -> list[list[Completion]]:
        self.calls += 1
        if self.fails and self.calls == 2:
            raise DataError("the engine is lost")
        one = Completion(text="said", finish=Finish.ended, token_ids=(config.seed, 1), log_probabilities=(-1.5, -0.25))
        return [[one] * config.samples for _ in prompts]


def _answers(folder: Path, *, fails: bool, weights: str) -> tuple[list[Rollout] | str, int]:
    """Ask two ranks for 2 answers to 6 prompts, 2 at a time: 6 chunks, 3 each."""
    from megatron_ads.training.rollout.engine import RolloutEngine
    from megatron_ads.training.rollout.generation import AnswerSettings, Generator, open_journal

    prompts, engine = [prompt(name) for name in "abcdef"], Counting(fails)
    with open_journal(folder) as journal:
        generator = Generator(
            RolloutEngine(engine=engine, ranks=(0, 1), sync=None, longest_wait_seconds=20),  # type: ignore[arg-type]
            {each.row.id: each.row for each in prompts},
            batch_size=2,
            journal=journal,
            longest_wait_seconds=20,
            on_progress=lambda: None,
        )
        settings = AnswerSettings(samples=2, max_new_tokens=4, seed=(0, 1, 1), weights=weights)
        try:
            found = generator.answer(prompts, settings)
        except DataError as error:
            return str(error), engine.calls
    return found, engine.calls


def _interrupted(folder: Path) -> list[tuple[list[Rollout] | str, int]]:
    return [
        _answers(folder, fails=True, weights="5-a"),
        _answers(folder, fails=False, weights="5-a"),
        _answers(folder, fails=False, weights="5-b"),
    ]


def test_chunks_that_were_finished_are_not_generated_again_by_the_same_weights(tmp_path: Path) -> None:
    for failed, again, by_others in run_ranks(2, _interrupted, tmp_path / "rollouts"):
        assert failed == ("the engine is lost", 2)  # on both ranks, after a finished chunk each
        rollouts, calls = again
        assert calls == 2 and by_others[1] == 3
        assert [each.group for each in rollouts] == [group for group in range(6) for _ in range(2)]  # type: ignore[union-attr]
        assert [each.row.id for each in rollouts] == [name for name in "abcdef" for _ in range(2)]  # type: ignore[union-attr]
        seeds = {each.answer_tokens[0] for each in rollouts}  # type: ignore[union-attr]
        assert len(seeds) == 6  # every chunk has its own


def test_a_prompt_that_a_server_refuses_ends_the_job_with_the_row_and_the_reason() -> None:
    settings = AnswerSettings(samples=2, max_new_tokens=4, seed=None, weights="0-abc")
    refused = Completion(text="HTTP 400: 900 tokens are too many", finish=Finish.refused)
    empty = Completion(text="", token_ids=(), log_probabilities=())
    for completion, said in ((refused, r"refused: HTTP 400: 900 tokens"), (empty, "ended")):
        with pytest.raises(DataError, match=rf"Row .a. has no answer \({said}.*--max-model-len"):
            _rollout(prompt("a"), 0, completion, settings)


MADE_WITH = {"train.global_batch_size": 2, "rollout.samples": 2, "rollout.max_new_tokens": 4}


def test_a_step_s_file_holds_what_was_written(tmp_path: Path) -> None:
    rollouts = [rollout(0), rollout(0, (9,)), rollout(1, name="b")]
    rewards = {"one": np.array([0.1, np.nan, 0.3]), "two": np.array([1.0, 2.0, 3.0])}
    found = ScoredStep(rollouts=rollouts, rewards=rewards, faults=Counter({"one/raised": 1}), draws=2, generated=4)
    write_step(step_file(tmp_path, 7), found, {"step": 7, "weights": "0-abc", "settings": MADE_WITH})
    assert read_header(step_file(tmp_path, 7))["weights"] == "0-abc" and not read_header(step_file(tmp_path, 8))
    rows = {each.row.id: each.row for each in rollouts}
    again = read_recorded(tmp_path, 7, rows, ["one", "two"], MADE_WITH)
    assert (again.rollouts, again.faults, again.draws, again.generated) == (rollouts, found.faults, 2, 4)
    np.testing.assert_array_equal(again.rewards["one"], rewards["one"])
    with pytest.raises(DataError, match=r"has no reward three \(rewards\.use\), only one, two"):
        read_recorded(tmp_path, 7, rows, ["three"], MADE_WITH)
    with pytest.raises(DataError, match=r"has answers to row 'b', which is not in data\.sources"):
        read_recorded(tmp_path, 7, {"a": rows["a"]}, ["one"], MADE_WITH)
    with pytest.raises(DataError, match=r"has no step-000008\.jsonl"):
        read_recorded(tmp_path, 8, rows, ["one"], MADE_WITH)


def _write_two_groups(folder: Path, header: Mapping[str, Any]) -> dict[str, ChatRow]:
    """Write the first step, two answers to each of two prompts; return the rows of the prompts."""
    rollouts = [rollout(0), rollout(0, (9,)), rollout(1, (7, 8, 9, 9), name="b"), rollout(1, name="b")]
    write_step(step_file(folder, 1), ScoredStep(rollouts=rollouts, rewards={"one": np.arange(4.0)}), header)
    return {each.row.id: each.row for each in rollouts}


@pytest.mark.parametrize("setting", MADE_WITH)
def test_rollouts_that_were_made_with_other_settings_are_refused(tmp_path: Path, setting: str) -> None:
    rows = _write_two_groups(tmp_path, {"settings": MADE_WITH})
    assert len(read_recorded(tmp_path, 1, rows, ["one"], MADE_WITH).rollouts) == 4
    there, here = MADE_WITH[setting], 2 * MADE_WITH[setting]
    said = rf"step-000001\.jsonl was made with {setting} = {there}, and this job has {here}\. Set it to {there}, or"
    with pytest.raises(DataError, match=said):
        read_recorded(tmp_path, 1, rows, ["one"], MADE_WITH | {setting: here})


def test_rollouts_that_do_not_say_with_which_settings_they_were_made_are_refused(tmp_path: Path) -> None:
    rows = _write_two_groups(tmp_path, {})
    with pytest.raises(DataError, match=r"step-000001\.jsonl does not say with which settings it was made\. Make it"):
        read_recorded(tmp_path, 1, rows, ["one"], MADE_WITH)


@pytest.mark.parametrize("lines", [1, 3, 4])
def test_a_file_that_is_cut_is_never_taken_for_a_whole_step(tmp_path: Path, lines: int) -> None:
    rows = _write_two_groups(tmp_path, {"settings": MADE_WITH})
    file = step_file(tmp_path, 1)
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:lines]))
    said = f"has {lines - 1} of the 4 rollouts that were written to it. Copy it again, or delete it"
    with pytest.raises(DataError, match=re.escape(said)):
        read_recorded(tmp_path, 1, rows, ["one"], MADE_WITH)


def test_an_answer_s_numbers_are_at_the_labels_of_its_tokens() -> None:
    row = policy_row(rollout(0, (7, 8)), 0.5)
    assert row.tokens.tolist() == [1, 2, 3, 7, 8] and row.loss_weights.tolist() == [0, 0, 0, 0.5, 0.5]
    # The label of position i is token i + 1: the answer's two are the last two of four.
    assert on_labels(row, np.array([5, 6], dtype=np.float32)).tolist() == [0, 0, 5, 6]


def test_minibatches_have_whole_groups_and_equally_many() -> None:
    rollouts = [rollout(group) for group in (0, 0, 1, 1, 1, 2, 3, 3)]
    assert minibatches(rollouts, 2) == [range(5), range(5, 8)]
    assert minibatches(rollouts, 1) == [range(8)]


def test_rewards_are_weighted_and_summed_over_those_that_an_answer_has() -> None:
    rewards = {"one": np.array([1.0, np.nan, np.nan]), "two": np.array([0.5, 0.25, np.nan])}
    np.testing.assert_array_equal(combined(rewards, {"one": 2.0, "two": 4.0}), [4.0, 1.0, np.nan])


class Fakes:
    """A generator and a judge in one: prompts named by a capital letter have answers that differ in their reward."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def answer(self, prompts: Sequence[PolicyPrompt], settings: AnswerSettings) -> list[Rollout]:
        self.asked.append([each.row.id for each in prompts])
        return [rollout(group, name=each.row.id) for group, each in enumerate(prompts) for _ in range(settings.samples)]

    def score(self, rollouts: Sequence[Rollout]) -> Scores:
        values = [float(place % 2) if each.row.id.isupper() else 0.5 for place, each in enumerate(rollouts)]
        return Scores(values={"one": np.array(values)})

    def conclude(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("names", "draws", "used"),
    [
        ("ABCD", 1, "ABCD"),
        ("AbCdEFgh", 2, "ACEF"),  # b and d are replaced
        ("Abcdefghijklmn", 3, "Abcd"),  # after 3 draws, what was drawn first fills the step
    ],
)
def test_groups_that_teach_nothing_are_replaced_and_the_step_is_never_smaller(
    names: str, draws: int, used: str, tmp_path: Path
) -> None:
    config = load_job("rl/quickstart", ["model.load=x", "train.global_batch_size=4", "rollout.dynamic_sampling=true"])
    assert isinstance(config, RlConfig)
    fakes, waiting = Fakes(), [prompt(name) for name in names]

    class InOrder:
        def draw(self, count: int) -> list[PolicyPrompt]:
            taken, waiting[:] = waiting[:count], waiting[count:]
            return taken

    prompts = Prompts(stream=InOrder(), held_out=[], probe=[], rows={})  # type: ignore[arg-type]
    collector = Collector(config=config, prompts=prompts, generator=fakes, rewards=fakes, folder=tmp_path)  # type: ignore[arg-type]
    found = collector._draw(1, prompts.stream, "0-a", PhaseTimes())
    assert [each.row.id for each in found.rollouts[::8]] == list(used)
    assert [each.group for each in found.rollouts] == [group for group in range(4) for _ in range(8)]
    assert (found.draws, found.generated) == (draws, 8 * sum(map(len, fakes.asked)))
    assert len(found.rewards["one"]) == 32
