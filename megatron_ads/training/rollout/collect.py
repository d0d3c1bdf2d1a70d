"""What a step is trained on: prompts drawn, answered and judged until there are enough groups that teach something."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_ads.config.rl import RlConfig, RolloutConfig
from megatron_ads.journal import digest_of
from megatron_ads.observability.log import get_logger
from megatron_ads.rewards.failures import RewardHistory, log_failures
from megatron_ads.rewards.registry import Rewards
from megatron_ads.rewards.scores import Scores, joined
from megatron_ads.rollouts import Rollout, groups_of
from megatron_ads.training.checkpoint_errors import failed_log_named, raised_on_all_ranks, raised_once_all_are_done
from megatron_ads.training.rollout.background import MadeStep
from megatron_ads.training.rollout.dump import ScoredStep, read_header, read_step, step_file, step_settings, write_step
from megatron_ads.training.rollout.generation import AnswerSettings, Generator
from megatron_ads.training.rollout.metrics import PhaseTimes
from megatron_ads.training.rollout.overlong import groups_that_teach_nothing, shaped
from megatron_ads.training.rollout.prompts import PolicyPrompt, Prompts, PromptStream
from megatron_ads.training.rollout.teacher import JobTeacher

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class JobRewards:
    """Rank 0 computes the rewards, all ranks get them."""

    rewards: Rewards | None
    """None but on rank 0."""
    longest_wait_seconds: float
    history: RewardHistory = field(default_factory=RewardHistory)

    def score(self, rollouts: Sequence[Rollout]) -> Scores:
        """Return what rollouts are worth; a collective.

        Raises:
            MegatronAdsError: On every rank, if a function of one's own cannot be imported or called.
        """
        found: list[Scores | None] = [None]
        with raised_once_all_are_done("compute the rewards", self.longest_wait_seconds):
            if self.rewards is not None:
                found = [self.rewards.score(rollouts)]
        dist.broadcast_object_list(found, src=0)
        assert found[0] is not None
        return found[0]

    def score_alone(self, rollouts: Sequence[Rollout]) -> Scores:
        """Return the same on rank 0, without the others."""
        assert self.rewards is not None, "this is rank 0"
        return self.rewards.score(rollouts)

    def tell(self, scores: Scores) -> None:
        """Log what failed, on rank 0."""
        if self.rewards is not None:
            log_failures(scores)

    def conclude(self, rollouts: Sequence[Rollout], scores: Scores) -> None:
        """Log what failed for the answers of a step, those of all its draws, or end the run because of it.

        Raises:
            DataError: On every rank that has the scores, by the rules of ``rewards/failures.py``.
        """
        self.history.require_values(rollouts, scores)
        self.tell(scores)


@dataclass(frozen=True, kw_only=True, slots=True)
class Collector:
    """Everything that makes the rollouts of a step; the same on every rank."""

    config: RlConfig
    prompts: Prompts
    generator: Generator
    rewards: JobRewards
    folder: Path
    teacher: JobTeacher | None = None

    def collect(self, step: int, weights: str, times: PhaseTimes) -> ScoredStep:
        """Return the rollouts of ``step`` by the current ``weights``, on every rank; a collective.

        They are written to the folder. What a job wrote there that was then resumed from an earlier step is taken, if
        it was made by the same weights for the same prompts.

        Raises:
            MegatronAdsError: On every rank, for anything the user can mend.
        """
        stream = self.prompts.stream
        file, header = step_file(self.folder, step), self._header(step, weights, stream.state_dict())
        if (found := self._finished(file, header)) is None:
            found = self._draw(step, stream, weights, times)
            with raised_on_all_ranks(), failed_log_named(self.folder):
                if dist.get_rank() == 0:
                    self._write(file, found, header, stream.state_dict())
            self.generator.forget()  # not before: what was generated of a later step than those on file is still there
        return found

    def make(self, step: int, weights: Sequence[str], prompts: Mapping[str, Any]) -> MadeStep:
        """Do the same on rank 0 alone, in a thread of its own: with any of ``weights`` on file, or else the last.

        The prompts of the job stay where they are.

        Raises:
            MegatronAdsError: For anything the user can mend.
        """
        file, stream, times = step_file(self.folder, step), self.prompts.stream.at(prompts), PhaseTimes()
        there, headers = read_header(file), [self._header(step, name, prompts) for name in weights]
        if any(header.items() <= there.items() for header in headers):
            _say_finished(file)
            return MadeStep(found=read_step(file, self.prompts.rows), prompts=there["prompts"])
        found = self._draw(step, stream, weights[-1], times, alone=True)
        behind = stream.state_dict()
        with failed_log_named(self.folder):
            self._write(file, found, headers[-1], behind)
        self.generator.forget()
        return MadeStep(found=found, prompts=behind, seconds=times.seconds)

    def _header(self, step: int, weights: str, prompts: Mapping[str, Any]) -> dict[str, Any]:
        made_by = [asdict(self.config.rollout), asdict(self.config.rewards), self.config.train.global_batch_size]
        if (teacher := self.config.teacher).is_there:
            made_by.append([teacher.kind, teacher.model])
        return {"step": step, "weights": weights, "made_by": digest_of([made_by, self.config.train.seed, prompts])}

    def _write(self, file: Path, found: ScoredStep, header: dict[str, Any], prompts: Mapping[str, Any]) -> None:
        write_step(file, found, header | {"prompts": prompts, "settings": step_settings(self.config)})

    def _finished(self, file: Path, header: dict[str, Any]) -> ScoredStep | None:
        there = read_header(file) if dist.get_rank() == 0 else {}
        prompts = [there["prompts"] if header.items() <= there.items() else None]
        dist.broadcast_object_list(prompts, src=0)
        if prompts[0] is None:
            return None
        with raised_on_all_ranks():
            found = read_step(file, self.prompts.rows)
        if dist.get_rank() == 0:
            _say_finished(file)
        self.prompts.stream.load_state_dict(prompts[0])
        return found

    def _draw(
        self, step: int, stream: PromptStream, weights: str, times: PhaseTimes, *, alone: bool = False
    ) -> ScoredStep:
        """Draw until enough groups have different rewards, or ``max_draws`` times; the others fill the step then.

        Whether rewards fail for so much that the run ends is decided over all draws.
        """
        rollout, wanted = self.config.rollout, self.config.train.global_batch_size
        kept, flat, answered, scored = list[_Group](), list[_Group](), list[Rollout](), list[Scores]()
        draws = 0
        while len(kept) < wanted and draws < (rollout.max_draws if rollout.dynamic_sampling else 1):
            draws += 1
            prompts, seed = stream.draw(wanted - len(kept)), (self.config.train.seed, step, draws)
            groups, found = self._answer(prompts, seed, weights, times, alone=alone)
            answered += [each for group in groups for each in group.rollouts]
            scored.append(found)
            for group in groups:
                (flat if rollout.dynamic_sampling and group.is_flat(rollout) else kept).append(group)
        scores = joined(scored)
        self.rewards.conclude(answered, scores)
        used, faults = [*kept, *flat][:wanted], scores.faults
        rollouts = [replace(each, group=number) for number, group in enumerate(used) for each in group.rollouts]
        if self.teacher is not None:
            with times.measured("teacher"):
                rollouts, lost = self.teacher.teach(rollouts, alone=alone)
            faults += lost
        return ScoredStep(
            rollouts=rollouts,
            rewards={name: np.concatenate([group.rewards[name] for group in used]) for name in used[0].rewards},
            faults=faults,
            draws=draws,
            generated=len(answered),
        )

    def _answer(
        self, prompts: Sequence[PolicyPrompt], seed: tuple[int, ...], weights: str, times: PhaseTimes, *, alone: bool
    ) -> tuple[list["_Group"], Scores]:
        rollout = self.config.rollout
        settings = AnswerSettings(
            samples=rollout.samples, max_new_tokens=rollout.max_new_tokens, seed=seed, weights=weights
        )
        with times.measured("rollout"):
            answer = self.generator.answer_alone if alone else self.generator.answer
            rollouts = answer(prompts, settings)
        with times.measured("reward"):
            scores = (self.rewards.score_alone if alone else self.rewards.score)(rollouts)
        groups, start = list[_Group](), 0
        for members in groups_of(rollouts):
            end = start + len(members)
            groups.append(_Group(members, {name: values[start:end] for name, values in scores.values.items()}))
            start = end
        return groups, scores


def _say_finished(file: Path) -> None:
    logger.info("the rollouts of %s were finished before; they are not generated again", file.name)


@dataclass(frozen=True, slots=True)
class _Group:
    rollouts: Sequence[Rollout]
    rewards: dict[str, NDArray[np.float64]]

    def is_flat(self, config: RolloutConfig) -> bool:
        """Return whether no reward has an update learn from its answers."""
        rewards = shaped(self.rewards, self.rollouts, config)
        return all(groups_that_teach_nothing(values, self.rollouts, config) for values in rewards.values())
