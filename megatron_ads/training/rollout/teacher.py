"""The teacher of on-policy distillation: how probable the policy's own answers are to it, token by token.

Rank 0 asks it, a server or a checkpoint, and all ranks get what it says. An answer for which it fails is counted and
told like one whose reward fails: it has no part in the distillation, and none in the update unless a reward judges it.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from megatron_ads.config.generation import ModelKind
from megatron_ads.config.rl import RlConfig, RolloutMode
from megatron_ads.config.teacher import TeacherConfig
from megatron_ads.data.chat import ChatTokenizer, load_tokenizer
from megatron_ads.errors import ConfigError, DataError, require
from megatron_ads.inference.engine import Finish
from megatron_ads.inference.model_folder import hugging_face_folder, tokenizer_folder
from megatron_ads.inference.openai_engine import OpenAIEngine
from megatron_ads.inference.servers import Server, Servers
from megatron_ads.inference.transformers_engine import TransformersEngine, open_engine
from megatron_ads.observability.log import get_logger
from megatron_ads.rewards.failures import counts_of, described
from megatron_ads.rewards.reward import Fault, RewardFailure
from megatron_ads.rollouts import Rollout
from megatron_ads.training.checkpoint_errors import raised_once_all_are_done

logger = get_logger(__name__)

Read = Callable[[Sequence[Rollout]], list[Sequence[float] | RewardFailure]]
"""Takes rollouts and returns the log-probabilities of each answer's tokens, or why there are none."""


class TeacherScores(NamedTuple):
    """What the teacher says of rollouts."""

    values: list[tuple[float, ...] | None]
    """Log-probabilities of each rollout's answer, in nats; None where there are none."""
    faults: Counter[str]
    """Rollouts of which it says nothing because something went wrong, by ``teacher/FAULT``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Teacher:
    """The teacher, on the rank that asks it."""

    read: Read
    stop: Callable[[], None] = lambda: None
    """Has the teacher be asked nothing more, from any thread."""

    def score(self, rollouts: Sequence[Rollout]) -> TeacherScores:
        """Return what the teacher says of rollouts.

        Raises:
            DataError: If it failed for all, or its server is lost.
        """
        found = [_checked(*pair) for pair in zip(self.read(rollouts), rollouts, strict=True)]
        failures = [values for values in found if isinstance(values, RewardFailure)]
        if failures:
            told = described("teacher", failures, len(found))
            if len(failures) == len(found):
                raise DataError(f"{told} and has a value for none. Correct it, or its settings.")
            logger.warning("%s.", told)
        return TeacherScores(
            values=[None if isinstance(values, RewardFailure) else values for values in found],
            faults=Counter({f"teacher/{fault}": count for fault, count in counts_of(failures).items()}),
        )


def _checked(values: Sequence[float] | RewardFailure, rollout: Rollout) -> tuple[float, ...] | RewardFailure:
    if isinstance(values, RewardFailure):
        return values
    if len(values) != len(rollout.answer_tokens):
        return RewardFailure(Fault.wrong_length, f"{len(values)} values for {len(rollout.answer_tokens)} tokens")
    if not all(map(math.isfinite, values)):
        return RewardFailure(Fault.not_finite, f"a log-probability of row {rollout.row.id} is no finite number")
    return tuple(values)


@dataclass(frozen=True, slots=True)
class JobTeacher:
    """Rank 0 asks the teacher, all ranks get what it says."""

    teacher: Teacher | None
    """None but on rank 0."""
    longest_wait_seconds: float

    def teach(self, rollouts: Sequence[Rollout], *, alone: bool = False) -> tuple[list[Rollout], Counter[str]]:
        """Return rollouts with the teacher's log-probabilities, and the faults; a collective, unless ``alone``.

        Rank 0 may call it ``alone``, without the others.

        Raises:
            MegatronAdsError: On every rank, if the teacher failed for all of them, or its server is lost.
        """
        if alone:
            assert self.teacher is not None, "this is rank 0"
            scores = self.teacher.score(rollouts)
        else:
            scores = self._scored_by_rank_0(rollouts)
        taught = [
            replace(rollout, teacher_log_probabilities=values)
            for rollout, values in zip(rollouts, scores.values, strict=True)
        ]
        return taught, scores.faults

    def _scored_by_rank_0(self, rollouts: Sequence[Rollout]) -> TeacherScores:
        found: list[TeacherScores | None] = [None]
        with raised_once_all_are_done("ask the teacher", self.longest_wait_seconds):
            if self.teacher is not None:
                found = [self.teacher.score(rollouts)]
        dist.broadcast_object_list(found, src=0)
        assert found[0] is not None, "rank 0 has it"
        return found[0]

    def stop(self) -> None:
        """Have the teacher be asked nothing more, from any thread: what waits for it raises."""
        if self.teacher is not None:
            self.teacher.stop()


@contextmanager
def open_job_teacher(config: RlConfig, tokenizer: ChatTokenizer) -> Iterator[JobTeacher | None]:
    """Yield the teacher of a recipe, None where it has none or reads its rollouts from a dump; a collective.

    Raises:
        MegatronAdsError: On every rank, if it cannot be loaded, or reads other tokens than the policy writes.
    """
    if not config.teacher.is_there or config.rollout.mode is RolloutMode.train_only:
        yield None
        return
    patience, teacher = config.runtime.load_timeout_seconds, None
    with ExitStack() as opened:
        with raised_once_all_are_done("open the teacher", patience):
            if dist.get_rank() == 0:
                require_same_tokens(config.teacher, tokenizer)
                teacher = opened.enter_context(_open_teacher(config.teacher, config.data.seq_length))
        yield JobTeacher(teacher, patience)


@contextmanager
def _open_teacher(config: TeacherConfig, seq_length: int) -> Iterator[Teacher]:
    if config.kind is ModelKind.local:
        with hugging_face_folder(Path(config.model or "")) as folder, closing(open_engine(folder)) as engine:
            require(
                engine.longest_text >= seq_length,
                f"teacher.model {config.model} has positions for {engine.longest_text} tokens, and data.seq_length is "
                f"{seq_length}. Lower it, or choose another teacher.",
            )
            yield Teacher(read=_by_checkpoint(engine, config.batch_size))
        return
    servers = Servers([Server("teacher", config)], wait_seconds=config.server_wait_seconds, section="teacher")
    with closing(OpenAIEngine("teacher", config, servers=servers, goes_on=True)) as served:
        yield Teacher(read=_by_server(served), stop=served.client.stop)


def _by_checkpoint(engine: TransformersEngine, batch_size: int) -> Read:
    def read(rollouts: Sequence[Rollout]) -> list[Sequence[float] | RewardFailure]:
        highest = [max(*rollout.prompt_tokens, *rollout.answer_tokens) for rollout in rollouts]
        known = [rollout for rollout, token in zip(rollouts, highest, strict=True) if token < engine.vocabulary_size]
        values = list[list[float]]()
        for start in range(0, len(known), batch_size):
            batch = known[start : start + batch_size]
            values += engine.log_probabilities(
                [rollout.prompt_tokens for rollout in batch], [rollout.answer_tokens for rollout in batch]
            )
        waiting = iter(values)
        return [
            next(waiting)
            if token < engine.vocabulary_size
            else RewardFailure(Fault.refused, f"token {token} is none of the {engine.vocabulary_size} that it has")
            for token in highest
        ]

    return read


def _by_server(engine: OpenAIEngine) -> Read:
    def read(rollouts: Sequence[Rollout]) -> list[Sequence[float] | RewardFailure]:
        answers = [rollout.answer_tokens for rollout in rollouts]
        found = list[Sequence[float] | RewardFailure]()
        for completion, answer in zip(
            engine.read([rollout.prompt_tokens for rollout in rollouts], answers), answers, strict=True
        ):
            if (values := completion.prompt_log_probabilities) is None:
                fault = Fault.unanswered if completion.finish is Finish.unanswered else Fault.refused
                found.append(RewardFailure(fault, completion.text))
            else:
                found.append(values[-len(answer) :])
        return found

    return read


def require_same_tokens(config: TeacherConfig, tokenizer: ChatTokenizer) -> None:
    """Refuse a teacher whose tokenizer has not every token of the policy's ``tokenizer`` under the same id.

    It may have more of them.

    Raises:
        ConfigError: Naming a token and its ids.
        DataError: If the teacher's folder has no tokenizer.
        ConversionError: If it is no checkpoint.
    """
    folder = Path(config.tokenizer) if config.tokenizer is not None else tokenizer_folder(Path(config.model or ""))
    own, other = tokenizer.fast.get_vocab(), load_tokenizer(folder).fast.get_vocab()
    different = sorted((number, token) for token, number in own.items() if other.get(token) != number)
    if different:
        number, token = different[0]
        there = f"has the id {other[token]}" if token in other else "is missing"
        raise ConfigError(
            f"the tokenizer of the teacher, {folder}, differs in {len(different)} of the policy's {len(own)} tokens: "
            f"{token!r}, here {number}, {there}. On-policy distillation compares tokens: choose a teacher with the "
            "policy's tokenizer."
        )
