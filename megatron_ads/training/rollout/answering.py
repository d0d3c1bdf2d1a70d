"""The policy as it answers: engines with the current weights, on all ranks, and what they are asked."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_ads.config.rl import RlConfig, RolloutMode
from megatron_ads.data.chat import ChatTokenizer
from megatron_ads.training.rollout.collect import Collector, JobRewards
from megatron_ads.training.rollout.dump import ScoredStep
from megatron_ads.training.rollout.engine import RolloutEngine, open_rollout_engine
from megatron_ads.training.rollout.generation import AnswerSettings, Generator, open_journal
from megatron_ads.training.rollout.metrics import PhaseTimes
from megatron_ads.training.rollout.probe import WeightProbe
from megatron_ads.training.rollout.prompts import Prompts
from megatron_ads.training.session import Session
from megatron_ads.training.streams import share_of


@dataclass(slots=True)
class Answering:
    """All methods are collectives."""

    session: Session
    engine: RolloutEngine
    probe: WeightProbe
    collector: Collector
    weights: str = ""
    """Name of the weights that the engines hold."""

    def follow(self) -> dict[str, float]:
        """Give the engines the weights that are trained; return metrics, such as how far they differ from it.

        Raises:
            ConversionError: On every rank, if that is too far.
        """
        self.engine.follow(self.session.model)
        self.weights, difference = self.probe.mark(self.session.model, self.engine.gap)
        self.engine.name_weights(self.weights)
        of_probe = {} if self.probe.max_logprob_diff is None else {"rollout/probe_logprob_abs_diff": difference}
        return of_probe | self.engine.metrics()

    def collect(self, step: int, times: PhaseTimes) -> ScoredStep:
        """Return the rollouts of a step, as ``Collector`` does."""
        return self.collector.collect(step, self.weights, times)

    def judge_held_out(self) -> dict[str, NDArray[np.float64]]:
        """Answer the held-out prompts greedily and return the rewards by name."""
        of = self.collector
        longest = of.config.rollout.max_new_tokens
        settings = AnswerSettings(samples=1, max_new_tokens=longest, seed=None, weights=self.weights)
        return of.rewards.score(of.generator.answer(of.prompts.held_out, settings)).values


@contextmanager
def open_answering(
    config: RlConfig, session: Session, prompts: Prompts, rewards: JobRewards, tokenizer: ChatTokenizer
) -> Iterator[Answering]:
    """Yield engines that hold the session's weights; a collective.

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
        )
        probe = WeightProbe(
            rows=prompts.probe,
            share=share_of(config, of_job.shards.layout),
            seq_length=config.data.seq_length,
            max_logprob_diff=config.rollout.max_logprob_diff if config.rollout.probe_rows else None,
        )
        collector = Collector(config=config, prompts=prompts, generator=generator, rewards=rewards, folder=folder)
        answering = Answering(session, engine, probe, collector)
        answering.follow()
        yield answering
        if session.is_finished:
            generator.forget()
