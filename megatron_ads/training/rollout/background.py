"""Rollouts that inference servers generate while the trainer updates: ``rollout.max_staleness`` above 0.

Rank 0 has one thread. It makes the rollouts of one step after another, from the drawing of prompts to their rewards,
each step's by one version of the weights. Step s is trained with the weights after s - 1 steps, and its rollouts may be
by those after s - 1 - max_staleness steps at the earliest. Servers get new weights while the thread rests: when the
step that it is at, and the one that is trained next, are finished.

With a staleness of 1, rollouts are thus by the weights before the latest update, but for those of the first step
(verl's one_step_off_policy). With more, how far behind they are depends on how fast the servers are (AReaL's eta, its
max_head_offpolicyness; arXiv:2505.24298), where AReaL goes on with an answer under new weights.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from megatron_ads.errors import DataError
from megatron_ads.training.rollout.dump import ScoredStep


@dataclass(frozen=True, kw_only=True, slots=True)
class MadeStep:
    """The rollouts of a step, and what making them did."""

    found: ScoredStep
    prompts: Mapping[str, Any]
    """State of the prompts behind those of the step."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """By phase."""


Make = Callable[[int, Sequence[str], Mapping[str, Any]], MadeStep]
"""Takes a step, the names of the weights that its rollouts may be by, those of the engine last, and the state of the
prompts before it."""


class BackgroundRollouts:
    """The thread, and the steps that it was given; only the main thread may call it."""

    def __init__(
        self,
        make: Make,
        *,
        max_staleness: int,
        last_step: int,
        longest_wait_seconds: float,
        stop: Callable[[], None],
    ) -> None:
        """Prepare a thread that calls ``make``; ``stop`` has a call that is under way end early, with an error."""
        self._make, self._max_staleness, self._last_step = make, max_staleness, last_step
        self._patience, self._stop = longest_wait_seconds, stop
        self._thread = ThreadPoolExecutor(1, "rollouts")
        self._steps: dict[int, Future[MadeStep]] = {}

    def take(self, step: int, weights: Sequence[str], prompts: Mapping[str, Any]) -> MadeStep:
        """Return the rollouts of ``step``, and let the thread continue with those behind it.

        Args:
            step: That is trained next.
            weights: Names of the latest ``max_staleness`` + 1 versions, or as many as there are; the current one last.
            prompts: State before those of ``step``.

        Raises:
            MegatronAdsError: What ``make`` raised for it.
            DataError: If it takes longer than it may.
        """
        for later in range(step, min(step + self._max_staleness, self._last_step) + 1):
            if later not in self._steps:
                recent = weights[-(step + self._max_staleness + 1 - later) :]
                before = self._steps.get(later - 1)
                self._steps[later] = self._thread.submit(self._make_behind, before, later, recent, prompts)
        self._wait_for([self._steps[step]])
        return self._steps.pop(step).result()

    def rest(self, step: int) -> None:
        """Return when the thread rests, which then has the rollouts of ``step``, or an error that ``take`` raises.

        Later steps that it has not begun are made by newer weights.

        Raises:
            DataError: If it takes longer than it may.
        """
        for later in sorted(self._steps, reverse=True):
            if later > step and self._steps[later].cancel():
                del self._steps[later]
        self._wait_for(self._steps.values())

    def close(self) -> None:
        """End the thread; requests in flight are waited for, so that their answers are kept."""
        self._stop()
        self._thread.shutdown(cancel_futures=True)

    def _make_behind(
        self, before: Future[MadeStep] | None, step: int, weights: Sequence[str], prompts: Mapping[str, Any]
    ) -> MadeStep:
        return self._make(step, weights, prompts if before is None else before.result().prompts)

    def _wait_for(self, steps: Iterable[Future[MadeStep]]) -> None:
        if wait(steps, timeout=self._patience).not_done:
            raise DataError(
                f"the inference servers did not finish the rollouts of a step in {self._patience:g} s "
                "(runtime.load_timeout_seconds). Look into their logs; raise the limit if they are only slow."
            )
