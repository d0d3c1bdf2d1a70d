"""What one evaluation is of besides the model, and where its results go."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ads.config.generation import GenerationConfig
from megatron_ads.disk import require_writable
from megatron_ads.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationRequest:
    """What one evaluation is of besides the model, and where its results go."""

    recipe: str
    """Whose held-out rows are answered: a shipped name or a file."""
    overrides: Sequence[str]
    """Settings that replace the recipe's."""
    batch_size: int
    max_new_tokens: int | None = None
    answers_file: Path | None = None
    how: GenerationConfig = field(default_factory=GenerationConfig)
    names_file: Path | None = None
    """Valid names, one a line; None: those of training rows."""
    ground: bool = False
    html_file: Path | None = None
    tokenizer_folder: Path | None = None
    """For a server."""
    compare_file: Path | None = None
    """Another model's answers to the same rows."""
    allow_missing: bool = False
    """Leave rows out that given answers lack."""
    merge_sources: bool = False
    """Score the rows of a task together, whatever sources they are of."""
    pipeline_folder: Path | None = None
    """A frozen pipeline, whose ranker says the CTCVR of what answers name."""
    ablate_history: bool = False
    """Answer again without each section of the users' histories."""

    def check(self, read: Sequence[Path]) -> None:
        """Refuse impossible numbers, and files that cannot be written, before hours are spent on what they are to hold.

        Args:
            read: Files of answers, besides ``compare_file``.

        Raises:
            ConfigError: If a number is impossible.
            DataError: If a file cannot be read or written, or is to be both.
        """
        for option, value in (("--batch-size", self.batch_size), ("--max-new-tokens", self.max_new_tokens)):
            if value is not None and value < 1:
                raise ConfigError(f"{option} is {value}; it must be at least 1.")
        given = [*read, *([self.compare_file] if self.compare_file else [])]
        for file in given:
            if not file.is_file():
                raise DataError(f"{file} is no file of answers. Check its path; --model or --url makes answers.")
        files = [file for file in (self.answers_file, self.html_file) if file]
        for file in files:
            if not file.parent.is_dir():
                raise DataError(f"{file} cannot be written: there is no folder {file.parent}. Create it.")
            if file.is_dir():
                raise DataError(f"{file} cannot be written: it is a folder. Name a file.")
            if file.resolve() in [one.resolve() for one in given]:
                raise DataError(f"{file} cannot be written: answers are read from it. Name another file.")
        require_writable(*files)
