"""The records that rows of data are on their way to a batch."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Role(StrEnum):
    """Who says a message."""

    system = "system"
    user = "user"
    assistant = "assistant"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str

    def as_dict(self) -> dict[str, Any]:
        """Return the form that chat templates take."""
        return {"role": str(self.role), "content": self.content}


@dataclass(frozen=True, slots=True)
class ChatRow:
    """One training example: a conversation whose last message, the assistant's, is the target."""

    id: str
    task: str
    messages: tuple[Message, ...]
    weight: float = 1.0
    """Multiplies the loss of the target."""
    group: str = ""
    """What must not be shared between training and validation: the query, the user. Empty: the row itself."""
    label: str | None = None
    """The true answer in the task's own words, for metrics; None where the task has none."""
    time: float | None = None
    """When what the target tells happened, in seconds since 1970, for splits by time; None where it has no time."""

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Everything before the target."""
        return self.messages[:-1]

    @property
    def target(self) -> str:
        """What the assistant should say, reasoning included."""
        return self.messages[-1].content


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """One training example in tokens. N tokens make N - 1 predictions."""

    id: str
    task: str
    tokens: NDArray[np.int32]
    """(N,): prompt, target, end token."""
    loss_weights: NDArray[np.float32]
    """(N,): weight of the loss of predicting each token; 0 for the prompt."""

    @property
    def predictions(self) -> int:
        """Positions the row occupies in a batch."""
        return len(self.tokens) - 1

    @property
    def target_count(self) -> int:
        """Predictions that count in the loss."""
        return int(np.count_nonzero(self.loss_weights[1:]))
