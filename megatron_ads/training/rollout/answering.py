"""The policy as it answers: engines with the current weights, on all ranks, and what they are asked."""

import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_ads.config.rl import RlConfig, RolloutMode
from megatron_ads.data.chat import ChatTokenizer
from megatron_ads.training.checkpoint_errors import raised_once_all_are_done
from megatron_ads.training.rollout.background import BackgroundRollouts, MadeStep
from megatron_ads.training.rollout.collect import Collector, JobRewards
from megatron_ads.training.rollout.dump import ScoredStep
from megatron_ads.training.rollout.engine import RolloutEngine, open_rollout_engine
from megatron_ads.training.rollout.generation import AnswerSettings, Generator, open_journal
from megatron_ads.training.rollout.metrics import PhaseTimes
from megatron_ads.training.rollout.probe import WeightProbe
from megatron_ads.training.rollout.prompts import Prompts
from megatron_ads.training.rollout.teacher import JobTeacher
from megatron_ads.training.session import Session
from megatron_ads.training.streams import share_of


@dataclass(slots=True)
class Answering:
    """All methods are collectives."""

    session: Session
    engine: RolloutEngine
    probe: WeightProbe
    collector: Collector
    weights: list[str]
    """Names of the latest ``rollout.max_staleness`` + 1 versions of the weights; the engines hold the last."""
    background: BackgroundRollouts | None
    """On the rank that generates while the trainer updates."""

    def follow(self) -> dict[str, float]:
        """Give the engines the weights that are trained; return metrics, such as how far they differ from it.

        Raises:
            ConversionError: On every rank, if that is too far.
        """
        self.engine.follow(self.session.model)
        name, difference = self.probe.mark(self.session.model, self.engine.gap)
        if [name] != self.weights[-1:]:  # after a skipped update, and in a job that continues, they are the same
            self.weights.append(name)
        del self.weights[: -1 - self._max_staleness]
        self.engine.name_weights(name)
        of_probe = {} if self.probe.max_logprob_diff is None else {"rollout/probe_logprob_abs_diff": difference}
        return of_probe | self.engine.metrics()

    def collect(self, step: int, times: PhaseTimes) -> ScoredStep:
        """Return the rollouts of a step, as ``Collector`` does; behind it the next are made in the background."""
        if not self._max_staleness:
            return self.collector.collect(step, self.weights[-1], times)
        made, stream = list[MadeStep | None]([None]), self.collector.prompts.stream
        with times.measured("wait"), raised_once_all_are_done("generate their answers", self._patience):
            if self.background is not None:
                made = [self.background.take(step, self.weights, stream.state_dict())]
        dist.broadcast_object_list(made, src=0)
        assert made[0] is not None, "rank 0 has it"
        stream.load_state_dict(made[0].prompts)
        times.add(made[0].seconds)
        return made[0].found

    def rest(self, step: int, times: PhaseTimes) -> None:
        """Return when nothing is generated in the background, and the rollouts of ``step`` are, or have failed.

        Raises:
            MegatronAdsError: On every rank, if that takes longer than it may.
        """
        if self._max_staleness:
            with times.measured("wait"), raised_once_all_are_done("generate their answers", self._patience):
                if self.background is not None:
                    self.background.rest(step)

    def staleness(self, found: ScoredStep) -> dict[str, float]:
        """Return how many updates, as the engines were given them, the weights of answers are behind."""
        if not self._max_staleness:
            return {}
        behind = [len(self.weights) - 1 - self.weights.index(rollout.weights) for rollout in found.rollouts]
        return {"rollout/staleness/mean": float(np.mean(behind)), "rollout/staleness/max": float(max(behind))}

    def judge_held_out(self) -> dict[str, NDArray[np.float64]]:
        """Answer the held-out prompts greedily and return the rewards by name; what fails is told, and ends no run."""
        of = self.collector
        longest = of.config.rollout.max_new_tokens
        settings = AnswerSettings(samples=1, max_new_tokens=longest, seed=None, weights=self.weights[-1])
        scores = of.rewards.score(of.generator.answer(of.prompts.held_out, settings))
        of.rewards.tell(scores)
        return scores.values

    @property
    def _max_staleness(self) -> int:
        return self.collector.config.rollout.max_staleness

    @property
    def _patience(self) -> float:
        return self.collector.config.runtime.load_timeout_seconds


@contextmanager
def open_answering(
    config: RlConfig,
    session: Session,
    prompts: Prompts,
    rewards: JobRewards,
    teacher: JobTeacher | None,
    tokenizer: ChatTokenizer,
    weights: list[str],
) -> Iterator[Answering]:
    """Yield engines that hold the session's weights; a collective.

    ``weights`` are the names of earlier versions, as in ``Answering``, which are kept up to date there.

    Raises:
        MegatronAdsError: On every rank, if some rank cannot load the model or keep its rollouts.
    """
    of_job, folder = session.membership, Path(config.log.dir) / "rollouts"
    with (
        open_journal(folder) as journal,
        open_rollout_engine(config, of_job, tokenizer, journal) as engine,
    ):
        generator = Generator(
            engine,
            prompts.rows,
            # Servers take requests as they have room: one batch, so that none waits for another one's last answer.
            batch_size=sys.maxsize if config.rollout.mode is RolloutMode.servers else config.rollout.batch_size,
            journal=journal,
            longest_wait_seconds=config.runtime.load_timeout_seconds,
            on_progress=of_job.activity.moved,
            names=prompts.names,
        )
        probe = WeightProbe(
            rows=prompts.probe,
            share=share_of(config, of_job.shards.layout),
            seq_length=config.data.seq_length,
            max_logprob_diff=config.rollout.max_logprob_diff if config.rollout.probe_rows else None,
        )
        collector = Collector(
            config=config, prompts=prompts, generator=generator, rewards=rewards, folder=folder, teacher=teacher
        )

        def stop() -> None:
            engine.stop()
            if teacher is not None:
                teacher.stop()

        background = None
        if config.rollout.max_staleness and dist.get_rank() == 0:
            background = BackgroundRollouts(
                collector.make,
                max_staleness=config.rollout.max_staleness,
                last_step=config.train.max_steps,
                longest_wait_seconds=config.runtime.load_timeout_seconds,
                stop=stop,
            )
        with nullcontext() if background is None else closing(background):
            answering = Answering(session, engine, probe, collector, weights, background)
            answering.follow()
            yield answering
        if session.is_finished:
            generator.forget()
