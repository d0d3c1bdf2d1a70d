"""Versioned prompt templates: one instruction in several wordings, of which the row's id picks one for good.

A version is never edited once rows were made with it: a change of wording is a new version.
"""

from dataclasses import dataclass

from megatron_ads.stable_random import stable_integer


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """What a task is asked, in several words for the same thing."""

    task: str
    version: int
    paraphrases: tuple[str, ...]
    """The first is the plain one."""
    answer_form: str = ""
    """How the answer is written, the same for every wording; empty: the model knows it from its training."""

    @property
    def name(self) -> str:
        """Task and version, for reports."""
        return f"{self.task}/{self.version}"

    def instruction(self, wording: int = 0) -> str:
        """Return one wording, with the form of the answer."""
        text = self.paraphrases[wording]
        return f"{text} {self.answer_form}" if self.answer_form else text

    def wording_of(self, row_id: str) -> int:
        """Return which wording a row has; it depends on this template and the id alone."""
        return stable_integer(self.name, row_id) % len(self.paraphrases)

    def instruction_of(self, row_id: str) -> str:
        """Return the instruction that a row has."""
        return self.instruction(self.wording_of(row_id))
