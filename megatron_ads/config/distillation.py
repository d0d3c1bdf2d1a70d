"""The typed schema of a recipe of `distill`, below ``recipes/distill/``, and checks that one setting cannot express.

Importing this module needs neither torch nor transformers.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from omegaconf import MISSING

from megatron_ads.config.data import SourceConfig, SourceKind
from megatron_ads.config.generation import ModelKind
from megatron_ads.config.labelling import LabelConfig, LabellerConfig
from megatron_ads.config.recipes import load_recipe_of
from megatron_ads.errors import require, require_above, require_at_least, require_between, require_distinct


class Student(StrEnum):
    """Which of the teacher's answers a student learns from."""

    checked = "checked"
    """Those that pass quality control."""
    unchecked = "unchecked"
    """All that can be read."""


@dataclass(kw_only=True, slots=True)
class QualityConfig:
    """Data quality control: what an answer of the teacher must be like. That it can be read is always asked for."""

    min_words: int = 8
    """Shortest reasoning, in tasks that reason; 0 is off."""
    min_details: int = 2
    """Words of the row's own input, which neither the instruction, the answer nor most other rows have, that the
    reasoning must mention; all of them where there are fewer. 0 is off."""
    min_probability: float = 0.5
    """Of the label, given what the teacher wrote before it. Of a server, this needs ``teacher.tokenizer``. 0 is off."""
    min_agreement: float = 0.5
    """Share of the further ``draws`` that give the same label; one that cannot be read does not. 0 is off."""
    min_similarity: float = 0.1
    """Mean similarity of the reasoning with that of the further ``draws``, by TF-IDF and a truncated SVD. 0 is off."""
    queries: bool = True
    """Remove rows of query_generation with a query that is broader than the keyword, off topic or repeated."""
    query_similarity: float = 0.1
    """A query without a word of the keyword and the ad is off topic below this similarity with them."""
    repeats: bool = True
    """Remove rows whose input has the same words as that of an earlier row of the task, in whatever order."""

    def check(self, draws: int) -> None:
        """Refuse impossible values, and those without effect where each row has so many ``draws``."""
        require_at_least("quality", self, 0, "min_words", "min_details")
        shares = ("min_probability", "min_agreement", "min_similarity", "query_similarity")
        require_between("quality", self, 0, 1, *shares)
        for name in ("min_agreement", "min_similarity"):
            require(
                draws > 1 or getattr(self, name) == 0,
                f"quality.{name} is {getattr(self, name):g}, which has no effect with draws = {draws}: there is "
                "nothing to compare with. Set it to 0, or raise draws.",
            )


@dataclass(kw_only=True, slots=True)
class StudentConfig:
    """The smaller model, and how it is fine-tuned."""

    load: str = MISSING
    """Checkpoint that it starts from, as ``model.load``."""
    recipe: str = "sft/small"
    """A fine-tuning recipe: a shipped name or a file."""
    settings: list[str] = field(default_factory=list)
    """Settings that replace the recipe's, ``[train.max_steps=400, optim.learning_rate=1e-3]``; rows, ``model.load`` and
    ``log.dir`` are given already."""
    validation_rows: int = 100
    """Of the teacher's answers, held out for the validation loss; 0 is none."""
    ranks: int = 1
    """Processes on this machine."""

    def check(self) -> None:
        """Refuse impossible values."""
        require_at_least("student", self, 0, "validation_rows")
        require_at_least("student", self, 1, "ranks")
        _refuse_decided("student", self.settings, ("model.load", "log.dir"))


@dataclass(kw_only=True, slots=True)
class OnPolicyConfig:
    """On-policy distillation of the first student, once it is fine-tuned: it answers the prompts of its rows itself.

    It learns from how probable its answers are to the teacher.
    """

    steps: int = 0
    """Of it; 0 is none."""
    recipe: str = "rl/on_policy_distillation"
    """A recipe of reinforcement learning: a shipped name or a file."""
    settings: list[str] = field(default_factory=list)
    """Settings that replace the recipe's, ``[rollout.max_new_tokens=256]``; rows, teacher, ``model.load`` and
    ``log.dir`` are given already."""

    def check(self) -> None:
        """Refuse impossible values, and those that have no effect."""
        require_at_least("on_policy", self, 0, "steps")
        require(
            self.steps > 0 or not self.settings,
            f"on_policy.settings is {self.settings}, which has no effect while on_policy.steps is 0. Raise that, or "
            "remove it.",
        )
        _refuse_decided("on_policy", self.settings, ("model.load", "log.dir", "train.max_steps"))


def _refuse_decided(section: str, settings: Sequence[str], given: Collection[str]) -> None:
    """Refuse settings of a job that are decided already."""
    for setting in settings:
        require(
            setting.lstrip("+~").partition("=")[0] not in given,
            f"{section}.settings has {setting!r}, which is decided already, by other settings of the recipe. Remove "
            "it.",
        )


@dataclass(kw_only=True, slots=True)
class JudgedRowsConfig:
    """The rows that teacher and students are compared on: those that a recipe holds out, with their true answers."""

    recipe: str = "sft/small"
    """A shipped name or a file; only its ``data`` section counts."""
    settings: list[str] = field(default_factory=list)
    """Settings that replace the recipe's, ``[data=jsonl, "data.sources=[...]"]``."""
    batch_size: int = 64
    """Sequences at once, where a checkpoint answers."""
    max_new_tokens: int | None = None
    """Longest answer; None: a quarter longer than the longest training target of the recipe."""

    def check(self) -> None:
        """Refuse impossible values."""
        require_at_least("judged", self, 1, "batch_size", "max_new_tokens")


@dataclass(kw_only=True, slots=True)
class DistillConfig:
    """A whole distillation."""

    sources: list[SourceConfig] = field(default_factory=list)
    """Rows that the teacher answers; answers that they have are not looked at, and those that are judged, or share a
    query or a user with them, are left out."""
    answered: list[SourceConfig] = field(default_factory=list)
    """Rows that have the teacher's answer already, as `data cook` writes them; taken as they are."""
    out: str = MISSING
    """Folder of everything; a run that was interrupted continues there."""
    teacher: LabellerConfig = field(default_factory=LabellerConfig)
    """Answers the rows."""
    reasoning: bool = True
    """Answers with reasoning, in tasks that reason; False: the answers alone."""
    attempts: int = 3
    """How often a row is asked at most, until its answer can be read."""
    draws: int = 3
    """Answers to each row: the first, which is learned from, and others that it is compared with; 1 is no others."""
    draw_temperature: float = 0.7
    """Of all but the first."""
    quality: QualityConfig = field(default_factory=QualityConfig)
    """What is removed for the student ``checked``."""
    students: list[Student] = field(default_factory=lambda: [Student.checked, Student.unchecked])
    """Those that are trained and judged."""
    student: StudentConfig = field(default_factory=StudentConfig)
    """The smaller model."""
    on_policy: OnPolicyConfig = field(default_factory=OnPolicyConfig)
    """What the first student learns on top."""
    judged: JudgedRowsConfig = field(default_factory=JudgedRowsConfig)
    """What all are compared on."""
    samples: int = 3
    """Removed answers that the report shows for each reason."""
    seed: int = 0
    """Decides draws, the order of rows, and the rows of generated sources."""

    def check(self) -> None:
        """Refuse values that cannot work.

        Raises:
            ConfigError: Naming the settings, their values and what to change.
        """
        given = "Name some: 'sources=[{kind: jsonl, path: FILE}]'."
        require(bool(self.sources or self.answered), f"sources and answered are both empty. {given}")
        for name in ("sources", "answered"):
            for index, source in enumerate(getattr(self, name)):
                source.check(f"{name}[{index}]")
        require_at_least("recipe", self, 0, "samples", "seed")
        require_at_least("recipe", self, 1, "attempts", "draws")
        require_above("recipe", self, 0, "draw_temperature")
        require(bool(self.students), f"students is empty. Name some of {', '.join(Student)}.")
        require_distinct("students", [str(student) for student in self.students])
        require(
            self.teacher.model is not None,
            "teacher.model is null. Name the model, or the checkpoint folder; it is judged, too.",
        )
        self.teacher.check("teacher")
        self.quality.check(self.draws)
        require(
            self.quality.min_probability == 0 or not self.sources or self.tells_probabilities,
            f"quality.min_probability is {self.quality.min_probability:g}, which needs the tokenizer of the served "
            "model. Name its folder in teacher.tokenizer, or set quality.min_probability=0.",
        )
        self.student.check()
        self.on_policy.check()
        self.judged.check()
        if self.sources:
            self.label_job(Path("questions.jsonl"), 0).check()

    @property
    def judged_settings(self) -> list[str]:
        """Settings of the recipe whose rows are judged: without reasoning, none is asked for there either."""
        return [*self.judged.settings, *([] if self.reasoning else ["data.reasoning=false"])]

    @property
    def tells_probabilities(self) -> bool:
        """Whether the teacher can say how probable its labels are."""
        return self.teacher.kind is ModelKind.local or self.teacher.tokenizer is not None

    def label_job(self, questions: Path, draw: int) -> LabelConfig:
        """Return the job of `label` that asks for the draw of a number, 0 being the answers that are learned from."""
        return LabelConfig(
            sources=[SourceConfig(kind=SourceKind.jsonl, path=str(questions))],
            out=str(Path(self.out) / "answers" / str(draw)),
            model=self.teacher,
            reasoning=self.reasoning,
            draws=self.attempts,
            first_draw=draw * self.attempts,
            draw_temperature=self.draw_temperature,
            log_probabilities=draw == 0 and self.quality.min_probability > 0,
            seed=self.seed,
        )


def load_distill_recipe(name_or_path: str, overrides: Sequence[str] = (), *, out: str | None = None) -> DistillConfig:
    """Compose a recipe with Hydra and return it as plain dataclasses, checked.

    Args:
        name_or_path: A shipped recipe such as ``distill/simulated``, or a YAML file of one's own.
        overrides: Hydra overrides, ``teacher.url=http://host:8000/v1``.
        out: Replaces the recipe's ``out``, whatever characters it has; None leaves it.

    Raises:
        ConfigError: If there is no such recipe, a key is unknown (the nearest known one is named), a value has the
            wrong type or is impossible, or a required one is missing.
    """
    config = load_recipe_of(DistillConfig, "distill", name_or_path, overrides, out=out)
    config.check()
    return config
