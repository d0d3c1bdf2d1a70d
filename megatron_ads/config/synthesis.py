"""The typed schema of a recipe of `data cook`, below ``recipes/cook/``, and checks that one setting cannot express.

Importing this module needs neither torch nor transformers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from omegaconf import MISSING, OmegaConf

from megatron_ads.config.data import SourceConfig
from megatron_ads.config.generation import AnsweringConfig
from megatron_ads.config.recipes import load_recipe_of
from megatron_ads.errors import require, require_at_least, require_between, require_distinct


class Style(StrEnum):
    """How a teacher is asked for reasoning."""

    auto = "auto"
    """``reverse_engineered`` for tasks that ask what somebody will do next, ``label_given`` for the others."""
    label_given = "label_given"
    """The label is given; the reasoning explains why it fits."""
    reverse_engineered = "reverse_engineered"
    """What happened next is given; the reasoning leads to it from what was known before."""


@dataclass(kw_only=True, slots=True)
class TemplateConfig:
    """A prompt of your own; golden check, journal and report know it by its name."""

    name: str = MISSING
    """With a version: a changed text is a new name."""
    wordings: list[str] = field(default_factory=list)
    """What stands behind question and answer: how to reason. Several say the same in other words."""
    tasks: list[str] = field(default_factory=list)
    """Tasks it is for; empty is all."""

    def check(self, section: str) -> None:
        """Refuse impossible values; ``section`` is where this stands in the recipe."""
        require(bool(self.name.strip()), f"{section}.name is {self.name!r}; the report needs one.")
        require(
            bool(self.wordings) and all(text.strip() for text in self.wordings),
            f"{section}.wordings is {self.wordings}; it must hold texts that are not empty.",
        )


@dataclass(kw_only=True, slots=True)
class GoldenConfig:
    """The check of every prompt template on rows whose labels are trusted, before it is used at scale."""

    path: str | None = None
    """Chat rows in a JSONL file; None draws rows from the sources, which says less."""
    rows: int = 10
    """Rows of each task; every wording of every template is asked about each. 0 leaves the check out."""
    pass_rate: float = 0.8
    """Share of each wording's answers that must be well formed, repeat the label and mention the input."""
    agreement: float = 0.0
    """Mean similarity of the reasoning about one row over the wordings that a template needs; 0 asks for none."""

    def check(self) -> None:
        """Refuse impossible values."""
        require_at_least("golden", self, 0, "rows")
        require_between("golden", self, 0, 1, "pass_rate", "agreement")
        require(
            self.path is None or self.rows > 0,
            f"golden.path is {self.path!r}, which has no effect with golden.rows = 0. Remove it, or raise golden.rows.",
        )


@dataclass(kw_only=True, slots=True)
class RejectConfig:
    """What a candidate must be like. Its form and its label are always checked."""

    min_words: int = 8
    """Shortest reasoning."""
    min_details: int = 2
    """Words of the row's own input, which neither the instruction, the answer nor most other rows have, that the
    reasoning must mention; all of them where there are fewer."""
    min_similarity: float = 0.1
    """Mean similarity with the row's other candidates; a candidate that they do not resemble is removed. 0 is off."""
    max_similarity: float = 0.98
    """A candidate that is more similar to an earlier one of its row is removed as a repetition; 1 is off."""
    embedding: str | None = None
    """A sentence-transformers model by name, for similarities; None is TF-IDF with a truncated SVD."""
    queries: bool = True
    """Leave out rows of query_generation with a query that is broader than the keyword, off topic or repeated."""
    query_similarity: float = 0.1
    """A query without a word of the keyword and the ad is off topic below this similarity with them."""

    def check(self) -> None:
        """Refuse impossible values."""
        require_at_least("reject", self, 0, "min_words", "min_details")
        require_between("reject", self, 0, 1, "min_similarity", "max_similarity", "query_similarity")
        require(
            self.min_similarity < self.max_similarity,
            f"reject.min_similarity = {self.min_similarity:g} must be below reject.max_similarity = "
            f"{self.max_similarity:g}: else every candidate with others is removed.",
        )


@dataclass(kw_only=True, slots=True)
class PerplexityConfig:
    """PPL(answer | prompt, reasoning) < R, by a checkpoint on this machine."""

    model: str | None = None
    """A Hugging Face folder, or shards, a torch_dist folder or a training checkpoint, which are exported to a temporary
    folder when they are needed. None leaves the filter out."""
    template_arguments: dict[str, Any] = field(default_factory=dict)
    """What the model's chat template is given besides the messages, such as ``{thinking: true}``."""
    batch_size: int = 8
    """Texts that are measured at once."""
    sample: int = 1000
    """Candidates over which R is found."""
    quantile: float = 0.5
    """R is this quantile of the sample; 0.5 is the median."""
    threshold: float | None = None
    """R itself; None finds it."""

    def check(self) -> None:
        """Refuse impossible values."""
        require_at_least("perplexity", self, 1, "batch_size", "sample", "threshold")
        require_between("perplexity", self, 0, 1, "quantile")
        require(
            self.model is not None or self.threshold is None,
            f"perplexity.threshold is {self.threshold}, which has no effect without perplexity.model. Remove it.",
        )


@dataclass(kw_only=True, slots=True)
class SynthesisConfig:
    """A whole run of `data cook`."""

    sources: list[SourceConfig] = field(default_factory=list)
    """Labelled rows, of tasks that the registry has; at least one source."""
    out: str = MISSING
    """Folder of the journal, the corpus and the report; a run that was interrupted continues there."""
    seed: int = 0
    """Decides wordings, draws, the order of the corpus and which rows are held out."""
    candidates: int = 3
    """Pieces of reasoning that are asked for, for each row."""
    style: Style = Style.auto
    """``label_given`` or ``reverse_engineered``; ``auto`` decides by task."""
    templates: list[TemplateConfig] = field(default_factory=list)
    """Prompts of your own, in place of the built-in one for the tasks they are for."""
    keep_per_row: int | None = None
    """Most candidates of a row that enter the corpus, those of the lowest perplexity first; None is all that pass."""
    validation_rows: int = 0
    """Rows of the corpus held out, in whole groups such as queries and users; 0 is none."""
    samples: int = 3
    """Removed candidates that the report shows for each reason."""
    teacher: AnsweringConfig = field(default_factory=AnsweringConfig)
    """Writes the reasoning."""
    verifier: AnsweringConfig = field(default_factory=lambda: AnsweringConfig(temperature=0.0, max_tokens=128))
    """Judges whether reasoning fits its input and holds; without ``verifier.model`` there is none."""
    golden: GoldenConfig = field(default_factory=GoldenConfig)
    """The check of prompt templates on rows whose labels are trusted."""
    reject: RejectConfig = field(default_factory=RejectConfig)
    """What removes a candidate."""
    perplexity: PerplexityConfig = field(default_factory=PerplexityConfig)
    """Removal of candidates whose answer a model finds improbable."""

    def check(self) -> None:
        """Refuse values that cannot work.

        Raises:
            ConfigError: Naming the settings, their values and what to change.
        """
        require(bool(self.sources), "sources is empty. Name one: 'sources=[{kind: jsonl, path: FILE}]'.")
        for index, source in enumerate(self.sources):
            source.check(f"sources[{index}]")
        require_at_least("recipe", self, 0, "seed", "validation_rows", "samples")
        require_at_least("recipe", self, 1, "candidates", "keep_per_row")
        for index, template in enumerate(self.templates):
            template.check(f"templates[{index}]")
        require_distinct("templates", [template.name for template in self.templates])
        require(self.teacher.model is not None, "teacher.model is null. Name the model, or the checkpoint folder.")
        self.teacher.check("teacher")
        self.verifier.check("verifier")
        self.golden.check()
        self.reject.check()
        self.perplexity.check()


def load_synthesis_recipe(
    name_or_path: str, overrides: Sequence[str] = (), *, out: str | None = None
) -> SynthesisConfig:
    """Compose a recipe with Hydra and return it as plain dataclasses, checked.

    Args:
        name_or_path: A shipped recipe such as ``cook/simulated``, or a YAML file of one's own.
        overrides: Hydra overrides, ``teacher.url=http://host:8000/v1``.
        out: Replaces the recipe's ``out``, whatever characters it has; None leaves it.

    Raises:
        ConfigError: If there is no such recipe, a key is unknown (the nearest known one is named), a value has the
            wrong type or is impossible, or a required one is missing.
    """
    config = load_recipe_of(SynthesisConfig, "cook", name_or_path, overrides, out=out)
    config.check()
    return config


def synthesis_recipe_yaml(config: SynthesisConfig) -> str:
    """Return the resolved recipe as YAML, which :func:`load_synthesis_recipe` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
