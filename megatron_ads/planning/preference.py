"""What preference training takes besides its updates: a reference on the hosts, and passes for log-probabilities.

A step has a forward pass of the policy over all of its answers, then an update on the same batches. The reference's
log-probabilities are computed once for each prompt of a job: a step that repeats prompts has no pass of the reference.
All of it is estimated, nothing was measured.
"""

from dataclasses import dataclass

from megatron_ads.planning import costs
from megatron_ads.planning.job import PlannedJob


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferenceCosts:
    """One step of preference training whose prompts are all new; seconds are estimates."""

    reference_host_bytes: int
    """Of the rank with most: the initial weights, on the card only while they are exchanged with the current ones."""
    policy_seconds: float
    reference_seconds: float
    """Mean over the steps: those of ``preference.reference_steps`` steps are computed together."""
    update_seconds: float

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of what a step consists of."""
        return {"passes": self.policy_seconds + self.reference_seconds, "updates": self.update_seconds}

    @property
    def bound_by(self) -> str:
        """The longest of them."""
        return max(self.parts, key=self.parts.__getitem__)

    @property
    def step_seconds(self) -> float:
        return sum(self.parts.values())


def preference_costs(job: PlannedJob, *, pipeline_seconds: float, update_seconds: float) -> PreferenceCosts | None:
    """Return what a step takes; None for a job without preferences.

    Args:
        pipeline_seconds: Forward and backward passes of the microbatches of a step.
        update_seconds: What an update takes besides.
    """
    if not job.has_preferences:
        return None
    forward_seconds = costs.forward_share(job) * pipeline_seconds
    return PreferenceCosts(
        reference_host_bytes=costs.reference_bytes(job),
        policy_seconds=forward_seconds,
        reference_seconds=forward_seconds,
        update_seconds=pipeline_seconds + update_seconds,
    )
