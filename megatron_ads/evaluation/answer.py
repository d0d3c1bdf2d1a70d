"""The record of what a model said to one held-out row."""

from dataclasses import dataclass

from megatron_ads.data.rows import ChatRow


@dataclass(frozen=True, slots=True)
class AnswerBeam:
    """One of several answers to a row."""

    text: str
    log_probability: float
    """The model's, in nats; of a valid name: given that the answer is one, without reasoning."""
    score: float
    """What beams are ordered by."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said to one held-out row."""

    row: ChatRow
    text: str
    """Special tokens are left out."""
    ended: bool
    """The model ended the answer itself; False: it was cut off at the limit."""
    beams: tuple[AnswerBeam, ...] = ()
    """Where there are beams: the best, whose text this answer has, and the others in order."""
