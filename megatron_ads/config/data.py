"""``data``: where rows come from, and how they become batches."""

import math
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from omegaconf import MISSING

from megatron_ads.errors import require, require_above, require_at_least, require_each


class SourceKind(StrEnum):
    """Where rows come from."""

    builtin = "builtin"
    simulator = "simulator"
    esci = "esci"
    next_brand = "next_brand"
    gsm8k = "gsm8k"
    jsonl = "jsonl"
    table = "table"
    verl = "verl"
    preference = "preference"


class SplitBy(StrEnum):
    """What keeps held-out rows apart from those trained on."""

    group = "group"
    """Whole groups, such as queries or users, are held out."""
    time = "time"
    """The latest rows are held out; rows without a time are all trained on."""


class AdsTask(StrEnum):
    """What a row asks the model for."""

    query_ad_relevance = "query_ad_relevance"
    query_ad_three_labels = "query_ad_three_labels"
    """Relevance, place and ad quality."""
    ad_user_relevance = "ad_user_relevance"
    query_generation = "query_generation"
    next_advertiser = "next_advertiser"
    next_advertiser_ranking = "next_advertiser_ranking"
    """Twenty names and five interests, in XML."""
    user_profile = "user_profile"
    model_comparison = "model_comparison"
    ad_rewriting = "ad_rewriting"


class RowVariant(StrEnum):
    """Another question over the same rows."""

    yes_no = "yes_no"
    """Rows of both relevance tasks and of the next advertiser."""
    choose_one = "choose_one"
    """One of 20; rows of the next advertiser, as the two below."""
    list_ranking = "list_ranking"
    several_forms = "several_forms"
    """The name and the three above, drawn by the row's id."""
    next_item = "next_item"
    """The semantic ID of the item converted with; rows of the next advertiser whose item has one by
    ``history.semantic_ids``."""


@dataclass(kw_only=True, slots=True)
class HistoryConfig:
    """How much of a user's history a prompt shows; sections are those of ``megatron_ads/tasks/user_history.py``."""

    without: list[str] | None = None
    """Sections left out, such as ``clicks``; None is the source's own choice."""
    window_days: dict[str, float] = field(default_factory=dict)
    """Oldest event shown, by section; the built-in windows hold for sections that are not named."""
    max_entries: int | None = None
    """Most entries of a section; None is the source's own number."""
    max_tokens: int | None = None
    """Sections are shortened until the history takes about so many tokens, counted as words and signs, semantic IDs
    aside; None is no limit."""
    semantic_ids: str | None = None
    """Folder that ``megatron-ads sid`` wrote: the section semantic_ids shows the IDs of recent items, and nothing else
    changes; None: those that the rows have themselves, if any."""

    def check(self, section: str) -> None:
        """Refuse impossible values; ``section`` is where this stands in the recipe."""
        require_at_least(section, self, 1, "max_entries", "max_tokens")
        for name, days in self.window_days.items():
            require(days > 0, f"{section}.window_days.{name} is {days}; it must be above 0.")


_NEXT_BRAND_TASKS = (AdsTask.next_advertiser, AdsTask.user_profile)
_OF_FILES = (SourceKind.jsonl, SourceKind.table, SourceKind.verl, SourceKind.preference)
_TASKS_OF_USERS = (*_NEXT_BRAND_TASKS, AdsTask.ad_user_relevance, AdsTask.next_advertiser_ranking)


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One source of rows."""

    kind: SourceKind = MISSING
    """``builtin``: generated query-ad pairs; ``simulator``: rows of any task from a simulated ads business; ``esci``:
    public query-product pairs; ``next_brand``: public purchases; ``gsm8k``: school mathematics, for the general mix;
    ``jsonl``: chat rows in a file; ``table``: a JSONL, Parquet or CSV file with columns of your own; ``verl``: a
    Parquet or JSONL file with verl's five columns, where a row may be a prompt alone; ``preference``: a Parquet or
    JSONL file of prompts with a chosen answer and rejected ones."""
    name: str | None = None
    """What results call the source, where several have rows of one task; None: its file's name, or its kind."""
    path: str | None = None
    """File or folder, for ``jsonl``, ``table``, ``verl`` and ``preference`` also a glob of parts, compressed or not;
    None for ``builtin`` and ``simulator``, and for public data below the folder that ``MEGATRON_ADS_DATA`` names."""
    task: AdsTask | None = None
    """What rows of ``simulator``, ``next_brand`` and ``table`` ask for. Without it ``next_brand`` asks for the next
    advertiser, and rows of ``table`` have a prompt and a target already."""
    variant: RowVariant | None = None
    """Ask the rows another way: ``yes_no``, ``choose_one`` (of 20), ``list_ranking`` (of 20) or ``several_forms``,
    which mixes these with the plain question, or for the item (``next_item``); None: as their task has it."""
    history: HistoryConfig = field(default_factory=HistoryConfig)
    """How much of a user's history the prompts show, where they show any."""
    columns: dict[str, str] = field(default_factory=dict)
    """``table``: which column holds each field of the task, ``{query: search_term, title: ad_title, label: grade}``."""
    values: dict[str, dict[Any, Any]] = field(default_factory=dict)
    """``table``: what the values of a field stand for, ``{label: {E: Good, S: Fair, 0: Bad}, event: {buy:
    matched_conversion, impression: null}}``; null leaves such rows out, values that are not named stay as they are."""
    anchor: str | None = None
    """``table`` with task next_advertiser: date that histories end at and answers begin with, ``2025-03-01`` (UTC); the
    file then holds one user event a row."""
    anchors: list[str] = field(default_factory=list)
    """Several such dates, in order, each of which gives every user a row; in place of ``anchor``."""
    anchor_spacing_days: float | None = None
    """Days from one anchor to the next; ``anchors`` then names the first and the last possible one."""
    answer_days: float | None = None
    """How many days from an anchor on the conversion may be that is the answer; None is 30."""
    events: str | None = None
    """``table`` with a row an example of a task about users: log of user events, a path as ``path``, that histories are
    made from; each ends at its row's ``time``."""
    event_columns: dict[str, str] = field(default_factory=dict)
    """Which column of ``events`` holds user, time, event and so on."""
    rejected: str | None = None
    """``table``, ``jsonl``, ``verl`` and ``preference``: file that rows which cannot be used are written to, with the
    reason; None: the first one ends the run."""
    weight: float = 1.0
    """Share of the rows drawn from this source, relative to the other sources' weights."""
    rows: int | None = None
    """Use at most this many rows; None is all (``builtin``, ``simulator``: as many as they generate)."""
    keep_share: bool = False
    """Keep the share in all samples that ``weight`` gives when ``reweight.tasks`` moves the others': for general-domain
    rows."""

    @property
    def anchor_dates(self) -> list[str]:
        """The dates that divide an event log; none for other sources."""
        return self.anchors if self.anchor is None else [self.anchor]

    @property
    def shows_users(self) -> bool:
        """Whether its prompts show users' histories, on which ``history`` decides."""
        by_task = self.kind in (SourceKind.table, SourceKind.simulator) and self.task in _TASKS_OF_USERS
        return by_task or self.kind is SourceKind.next_brand

    def check(self, section: str) -> None:
        """Refuse impossible values; ``section`` is where this source stands in the recipe."""
        wanted = "above 0. Remove the source to leave it out"
        require_each(section, self, ["weight"], lambda weight: 0 < weight < math.inf, wanted)
        require_at_least(section, self, 1, "rows")
        self.history.check(f"{section}.history")
        require(
            self.path is not None or self.kind not in _OF_FILES,
            f"{section}.path is missing; kind {self.kind} reads a file of rows.",
        )
        require(
            self.path is None or self.kind not in (SourceKind.builtin, SourceKind.simulator),
            f"{section}.path is {self.path!r}, which has no effect with kind {self.kind}. Remove it, or set kind: "
            "jsonl.",
        )
        self._check_effects(section)

    def _check_effects(self, section: str) -> None:
        """Refuse settings that this kind of source does not read."""
        is_table = self.kind is SourceKind.table
        self._check_anchors(section)
        self._check_events(section, may_have=is_table and self.shows_users and not self.anchor_dates)
        if self.kind is SourceKind.simulator:
            require(
                self.task is not None, f"{section}.task is missing; kind simulator needs one of {', '.join(AdsTask)}."
            )
        else:
            require(
                self.task is None or is_table or (self.shows_users and self.task in _NEXT_BRAND_TASKS),
                f"{section}.task is {self.task}, which has no effect with kind {self.kind}. Remove it.",
            )
        require(
            self.shows_users or self.history == HistoryConfig(),
            f"{section}.history has no effect: these rows show no user's history. Remove it.",
        )
        require(is_table or not self.values, f"{section}.values has no effect with kind {self.kind}. Remove it.")
        require(is_table or not self.columns, f"{section}.columns has no effect with kind {self.kind}. Remove it.")
        require(
            not is_table or bool(self.columns),
            f"{section}.columns is missing; kind table needs to know them. `megatron-ads data preview --source "
            f"{self.path or 'FILE'}` proposes them.",
        )
        require(
            self.kind in _OF_FILES or self.rejected is None,
            f"{section}.rejected is {self.rejected!r}, which has no effect with kind {self.kind}. Remove it.",
        )

    def _check_events(self, section: str, *, may_have: bool) -> None:
        """Refuse a log of events that nothing reads, or of which nobody knows where a history ends."""
        require(
            may_have or self.events is None,
            f"{section}.events has no effect: only kind table with a row an example of {', '.join(_TASKS_OF_USERS)} "
            "reads it. Remove it.",
        )
        require(
            (self.events is None) == (not self.event_columns),
            f"{section}.events is {self.events} and {section}.event_columns is {self.event_columns}; give both.",
        )
        require(
            self.events is None or "time" in self.columns,
            f"{section}.columns must say which column holds time: the history from {section}.events ends there.",
        )

    def _check_anchors(self, section: str) -> None:
        """Refuse anchors that contradict one another, or that nothing reads."""
        may_have = self.kind is SourceKind.table and self.task is AdsTask.next_advertiser
        # Rows that only ask have no advertiser either, but tell what their user did, or where that is logged.
        tells_nothing = self.columns.keys() <= {"id", "user", "time"} and self.events is None
        is_log = may_have and ("event" in self.columns or tells_nothing)
        given = ", ".join(self.anchor_dates) or None
        require(
            (may_have or given is None) and (given is not None or not is_log),
            f"{section}.anchor is {given}; kind table with task next_advertiser needs one for a log of events, others "
            "have no use for it.",
        )
        require(
            self.anchor is None or not self.anchors,
            f"{section}.anchor is {self.anchor} and {section}.anchors is {', '.join(self.anchors)}. Remove one.",
        )
        require(
            self.anchor_spacing_days is None or len(self.anchors) == 2,
            f"{section}.anchor_spacing_days is {self.anchor_spacing_days}; {section}.anchors must then name two dates, "
            f"the first and the last possible anchor, not {len(self.anchors)}.",
        )
        require(
            self.answer_days is None or given is not None,
            f"{section}.answer_days is {self.answer_days}, which has no effect without an anchor. Remove it.",
        )
        require_above(section, self, 0, "anchor_spacing_days", "answer_days")


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Rows and how they become batches."""

    sources: list[SourceConfig] = field(default_factory=list)
    """Where rows come from; at least one."""
    seq_length: int = 4096
    """Tokens of one row of a batch."""
    reasoning: bool = True
    """False empties the block of reasoning of every ads row: the model learns the answers alone, and its answers are
    read without reasoning. For comparisons with models that reason."""
    template_arguments: dict[str, Any] = field(default_factory=dict)
    """What the checkpoint's chat template is given besides the messages: ``{thinking: true}`` makes that of
    DeepSeek-V3.1 open the reasoning. Evaluation and preview give the same."""
    packing: bool = True
    """Put several samples into one row, attention kept inside each."""
    seed: int = 0
    """Decides the order of rows and which of them are held out."""
    validation_rows: int = 0
    """Rows held out for evaluation, from every task in proportion to its rows; 0 is none."""
    split_by: SplitBy = SplitBy.group
    """Which rows are held out: those of whole groups such as queries and users, or the latest."""
    validation_rows_per_group: int | None = None
    """Most rows that one held-out group, such as a query, gives; fewer spread the evaluation over more groups, whose
    other rows take no part. None is all."""

    prepared_dir: str | None = None
    """Folder of rows that have been read, checked and tokenized; jobs with the same rows share them there. None is
    ``prepared`` in ``log.dir``."""
    prepare_workers: int | None = None
    """Processes that prepare the rows; None: as many as a rank has cores."""
    prepare_timeout_seconds: float = 3600.0
    """How long a rank waits for another process that prepares its rows and makes no progress."""

    def check(self) -> None:
        """Refuse values that are impossible whatever the other sections say."""
        require(
            bool(self.sources),
            "data.sources is empty. Choose data=simulator or data=esci, or 'data.sources=[{kind: jsonl, path: FILE}]'.",
        )
        for index, source in enumerate(self.sources):
            source.check(f"data.sources[{index}]")
        files = Counter(source.rejected for source in self.sources if source.rejected is not None)
        repeated = [file for file, count in files.items() if count > 1]
        require(
            not repeated,
            f"{', '.join(repeated)} is the rejected file of several of data.sources, each of which would replace it. "
            "Name a file for each.",
        )
        names = Counter(source.name for source in self.sources if source.name is not None)
        same = [name for name, count in names.items() if count > 1]
        require(
            not same,
            f"{', '.join(same)} is the name of several of data.sources, which results would not tell apart. Name each "
            "differently.",
        )
        require_at_least("data", self, 2, "seq_length")
        require_at_least("data", self, 0, "seed", "validation_rows")
        require_at_least("data", self, 1, "prepare_workers")
        require_above("data", self, 0, "prepare_timeout_seconds")
        require(
            self.split_by is SplitBy.group or self.validation_rows_per_group is None,
            f"data.validation_rows_per_group is {self.validation_rows_per_group}, which has no effect with "
            "data.split_by time. Remove it.",
        )
        require_at_least("data", self, 1, "validation_rows_per_group")
        require(
            self.validation_rows_per_group is None or self.validation_rows > 0,
            f"data.validation_rows_per_group is {self.validation_rows_per_group}, but data.validation_rows is 0: "
            "nothing is held out. Set data.validation_rows, or data.validation_rows_per_group to null.",
        )
