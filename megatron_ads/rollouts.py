"""What a policy wrote behind a prompt, as it goes from an engine through rewards to an update and to disk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from megatron_ads.rows import ChatRow


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One answer. Those of one prompt are consecutive and form a group."""

    row: ChatRow
    """Whose prompt it answers."""
    group: int
    """Number of the prompt in the step."""
    prompt_tokens: tuple[int, ...]
    answer_tokens: tuple[int, ...]
    """End token included, where the policy wrote one."""
    text: str
    """Of the answer, without special tokens."""
    cut_off: bool
    """At ``rollout.max_new_tokens``."""
    log_probabilities: tuple[float, ...]
    """The engine's, in nats, of each token of the answer."""
    weights: str
    """By which weights it was made: how many updates they had, and a digest of what they say of the probe."""
    teacher_log_probabilities: tuple[float, ...] | None = None
    """The teacher's, in nats, of each token of the answer; None: there is no teacher, or it failed for this one."""

    def as_record(self) -> dict[str, Any]:
        """Return JSON values for a journal; the row by its id, and nothing of a teacher where it says nothing."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None} | {"row": self.row.id}

    @classmethod
    def from_record(cls, record: Mapping[str, Any], rows: Mapping[str, ChatRow]) -> "Rollout":
        """Return what ``as_record`` wrote, with its row from those of the job."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list | tuple) else value for name, value in record.items()
        }
        return cls(**values | {"row": rows[record["row"]]})


def groups_of(rollouts: Sequence[Rollout]) -> list[Sequence[Rollout]]:
    """Return the rollouts of each prompt, in order."""
    starts = [place for place, each in enumerate(rollouts) if not place or rollouts[place - 1].group != each.group]
    return [rollouts[start:end] for start, end in zip(starts, [*starts[1:], len(rollouts)], strict=True)]
