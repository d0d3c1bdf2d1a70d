"""A team's own tables with one row an example: columns of any names, mapped to the fields of a task, every row checked.

Fields of a task are declared here; the columns that hold them, in the recipe. A row that cannot be used has a named
reason and its number; it ends the reading, or is counted and written aside where the recipe names a file for that.
Logs of user events are read by ``event_tables``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_ads.config.data import AdsTask
from megatron_ads.data.bad_rows import BadRow, BadRowError, RowReader, usable_rows, usable_weight
from megatron_ads.data.source_files import RowOrigin, parts_of
from megatron_ads.data.table_fields import FieldMapping, one_of, optional_text, text_of, texts_of, time_of
from megatron_ads.data.table_files import Cell, Cells, read_table
from megatron_ads.data.user_features import ViewChooser
from megatron_ads.errors import DataError
from megatron_ads.rows import ChatRow, Message, Role
from megatron_ads.tasks import (
    ad_rewriting,
    ad_user_relevance,
    model_comparison,
    next_advertiser,
    query_generation,
    relevance,
    user_profile,
)
from megatron_ads.tasks.ad_user_relevance import Score
from megatron_ads.tasks.model_comparison import Risk, Verdict
from megatron_ads.tasks.prompts import Ad
from megatron_ads.tasks.relevance import Flag, Label
from megatron_ads.tasks.text_rows import facts_of_text_row
from megatron_ads.tasks.user_history import FULL_VIEW, Event, EventKind, UserHistory

_EVERY_ROW = ("id", "reasoning", "time")
_AD = ("description", "seller")
_PAST = "past_advertisers"
_USER = (*map(str, EventKind), _PAST, "age", "gender", "state")
"""What a row says of its user: each a list of texts, the newest first, but for the last three."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Users:
    """What rows say of their users, and how much of it a prompt shows."""

    view_of: ViewChooser = lambda history: FULL_VIEW
    history_of: Callable[[str, float], UserHistory] | None = None
    """The history of a user before a time; None: a row's own lists are all that is known."""

    def of(self, cells: Cells) -> UserHistory:
        """Return a row's user. Lists of a row have no times: all their events count as of the row's day."""
        events = [Event(kind=kind, days_ago=0.0, text=text) for kind in EventKind for text in texts_of(cells, kind)]
        bought = EventKind.matched_conversion
        events += [Event(kind=bought, days_ago=0.0, text=name, advertiser=name) for name in texts_of(cells, _PAST)]
        user = UserHistory(user_id=text_of(cells, "user"), events=tuple(events))
        if self.history_of is not None:
            logged = self.history_of(user.user_id, time_of(cells, "time"))
            user = replace(logged, events=(*user.events, *logged.events))
        given = {name: optional_text(cells, name) for name in ("age", "gender", "state")}
        known = {name: text for name, text in given.items() if text}
        return replace(user, demographics=replace(user.demographics, **known))


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """What rows of a task are made from."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = _EVERY_ROW
    make: Callable[[str, Cells, "Users"], ChatRow]
    """From a row's id, its fields and what gives its user."""
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """What fields that hold a label may be."""
    answer: Mapping[str, Cell] = field(default_factory=dict)
    """Fields that the answer is made from, with what stands for them in rows that only ask."""


def table_rows(
    path: Path,
    *,
    columns: Mapping[str, str],
    task: AdsTask | None = None,
    values: Mapping[str, Mapping[Any, Any]] | None = None,
    users: Users | None = None,
    rejected: Path | None = None,
    limit: int | None = None,
) -> list[ChatRow]:
    """Return the usable rows of a source, the first ``limit`` of them.

    Args:
        path: A JSONL, Parquet, CSV or TSV file, or a folder or glob of such parts.
        columns: Field -> the column that holds it.
        task: What the rows ask for; None: they have a prompt and a target already.
        values: Field -> value -> what it stands for.
        users: What gives the users of rows; None: the rows alone, shown in full.
        rejected: Where to write rows that cannot be used; None: the first one is an error.

    Raises:
        ConfigError: If a field is unknown or missing, or a value stands for nothing known.
        DataError: If a file cannot be read or there is no usable row; with the row number, for the first bad row.
    """
    reader = table_reader(path, columns=columns, task=task, values=values, users=users)
    return usable_rows(reader, rejected=rejected, limit=limit)


def table_reader(
    path: Path,
    *,
    columns: Mapping[str, str],
    task: AdsTask | None,
    values: Mapping[str, Mapping[Any, Any]] | None,
    users: Users | None,
    answered: bool = True,
) -> RowReader[Cells]:
    """Return how the rows of ``table_rows`` are read; the arguments are as there.

    Without ``answered``, columns for the answer are neither needed nor read, and rows have the answers of their form.
    """
    form = FORMS[task]
    mapping, needed = _mapping(form, columns, values or {}, answered=answered), form.required
    stand_ins = {} if answered else form.answer

    def make(origin: RowOrigin, by_column: Cells) -> ChatRow | None:
        cells = mapping.cells(by_column)
        if cells is None:
            return None
        cells = {**cells, **stand_ins}
        for name in needed:
            if cells[name] is None:
                message = f"{name} is None; it must be text that is not empty. Its column is {columns[name]!r}."
                raise BadRowError(BadRow.empty_text, message)
            if not isinstance(cells[name], list | bool):
                text_of(cells, name)
        try:
            row = form.make(optional_text(cells, "id") or origin.row_id, cells, users or Users())
        except BadRowError:
            raise
        except DataError as error:  # from the task: the text holds what the answer's form needs for itself
            raise BadRowError(BadRow.unusable_text, str(error)) from None
        return replace(row, time=time_of(cells, "time")) if optional_text(cells, "time") else row

    return RowReader(
        path=path,
        parts=parts_of(path),
        read=lambda part, span: read_table(part, mapping.needed, span),
        make=make,
    )


def _mapping(
    form: Form, columns: Mapping[str, str], values: Mapping[str, Mapping[Any, Any]], *, answered: bool
) -> FieldMapping:
    if answered:
        return FieldMapping.of(columns, values, required=form.required, optional=form.optional, choices=form.choices)
    FieldMapping.of(columns, {}, required=(), optional=(*form.required, *form.optional), choices={})  # no other names
    asking = {name: column for name, column in columns.items() if name not in form.answer}
    return FieldMapping.of(
        asking,
        {name: meanings for name, meanings in values.items() if name not in form.answer},
        required=[name for name in form.required if name not in form.answer],
        optional=[name for name in form.optional if name not in form.answer],
        choices=form.choices,
    )


def _ad_of(cells: Cells) -> Ad:
    return Ad(text_of(cells, "title"), optional_text(cells, "description"), optional_text(cells, "seller"))


def _reasoning(cells: Cells) -> str:
    return optional_text(cells, "reasoning")


def _pair_row(row_id: str, cells: Cells, users: Users) -> ChatRow:
    ad = _ad_of(cells)
    flags = {name: one_of(cells, name, tuple(Flag)) for name in ("location", "quality") if optional_text(cells, name)}
    label = one_of(cells, "label", tuple(Label))
    query = text_of(cells, "query")
    return relevance.chat_row(
        row_id, query, ad, Label(label), _reasoning(cells), **{name: Flag(flag) for name, flag in flags.items()}
    )


def _score_row(row_id: str, cells: Cells, users: Users) -> ChatRow:
    user, score = users.of(cells), Score(one_of(cells, "score", tuple(Score)))
    return ad_user_relevance.chat_row(row_id, user, _ad_of(cells), score, _reasoning(cells), view=users.view_of(user))


def _queries_row(row_id: str, cells: Cells, users: Users) -> ChatRow:
    queries, reasons = texts_of(cells, "queries"), texts_of(cells, "reasons")
    if len(queries) != len(reasons):
        raise BadRowError(BadRow.wrong_type, f"there are {len(queries)} queries, but {len(reasons)} reasons for them.")
    brief = query_generation.KeywordBrief(
        text_of(cells, "keyword"), _ad_of(cells) if optional_text(cells, "title") else None, len(queries)
    )
    generated = list(map(query_generation.GeneratedQuery, queries, reasons))
    return query_generation.chat_row(row_id, brief, generated, _reasoning(cells))


def _next_row(row_id: str, cells: Cells, users: Users) -> ChatRow:
    user = users.of(cells)
    request = next_advertiser.AdvertiserRequest(user, texts_of(cells, "pool"))
    advertiser = text_of(cells, "advertiser")
    if "advertisers" not in cells:
        return next_advertiser.chat_row(row_id, request, advertiser, _reasoning(cells), view=users.view_of(user))
    names, interests = texts_of(cells, "advertisers"), texts_of(cells, "interests")
    return next_advertiser.ranking_row(
        row_id, request, names, interests, _reasoning(cells), label=advertiser, view=users.view_of(user)
    )


def _profile_row(row_id: str, cells: Cells, users: Users) -> ChatRow:
    user = users.of(cells)
    lists = {name: texts_of(cells, name) for name in ("interests", "intents", "constraints", "avoid")}
    profile = user_profile.Profile(summary=text_of(cells, "summary"), reasoning=_reasoning(cells), **lists)
    return user_profile.chat_row(row_id, user, profile, view=users.view_of(user))


def _comparison_row(row_id: str, cells: Cells, users: Users) -> ChatRow:
    shared = model_comparison.SharedRequest(*(text_of(cells, name) for name in ("request", "current", "new")))
    assessment = model_comparison.Assessment(
        strengths=texts_of(cells, "strengths"),
        weaknesses=texts_of(cells, "weaknesses"),
        risk=Risk(one_of(cells, "risk", tuple(Risk))),
        verdict=Verdict(one_of(cells, "verdict", tuple(Verdict))),
        reasoning=_reasoning(cells),
    )
    return model_comparison.chat_row(row_id, shared, assessment)


def _rewriting_row(row_id: str, cells: Cells, users: Users) -> ChatRow:
    brief = ad_rewriting.RewriteBrief(_ad_of(cells), texts_of(cells, "keywords"))
    if goal := optional_text(cells, "goal"):
        brief = replace(brief, goal=goal)
    rewrite = ad_rewriting.Rewrite(
        title=text_of(cells, "new_title"),
        text=text_of(cells, "new_text"),
        rationale=text_of(cells, "rationale"),
        keywords=texts_of(cells, "new_keywords"),
        reasoning=_reasoning(cells),
    )
    return ad_rewriting.chat_row(row_id, brief, rewrite)


def _chat_row(row_id: str, cells: Cells, users: Users) -> ChatRow:
    given = optional_text(cells, "weight")
    prompt, target = text_of(cells, "prompt"), text_of(cells, "target")
    row = ChatRow(
        id=row_id,
        task=optional_text(cells, "task") or "chat",
        messages=(Message(Role.user, prompt), Message(Role.assistant, target)),
        weight=usable_weight(given or "1", text=True),
        group=optional_text(cells, "group"),
        label=optional_text(cells, "label") or None,
    )
    return facts_of_text_row(row)


_LABELS = {"label": tuple(Label), "location": tuple(Flag), "quality": tuple(Flag)}
_ANY = "-"
"""Stands for a text of an answer that nobody reads."""
QUERIES_WANTED = 5
"""What rows of query_generation without an answer ask for."""

FORMS: dict[AdsTask | None, Form] = {
    None: Form(
        required=("prompt", "target"),
        optional=("id", "task", "group", "label", "weight", "time"),
        make=_chat_row,
        answer={"target": _ANY, "label": None, "weight": None},
    ),
    AdsTask.query_ad_relevance: Form(
        required=("query", "title", "label"),
        optional=("id", *_AD, "reasoning", "location", "quality", "time"),
        make=_pair_row,
        choices=_LABELS,
        answer={"label": str(Label.bad), "location": None, "quality": None, "reasoning": None},
    ),
    AdsTask.query_ad_three_labels: Form(
        required=("query", "title", "label", "location", "quality"),
        optional=(*_EVERY_ROW, *_AD),
        make=_pair_row,
        choices=_LABELS,
        answer={"label": str(Label.bad), "location": str(Flag.bad), "quality": str(Flag.bad), "reasoning": None},
    ),
    AdsTask.ad_user_relevance: Form(
        required=("user", "title", "score"),
        optional=(*_EVERY_ROW, *_AD, *_USER),
        make=_score_row,
        choices={"score": tuple(Score)},
        answer={"score": str(next(iter(Score))), "reasoning": None},
    ),
    AdsTask.query_generation: Form(
        required=("keyword", "queries", "reasons"),
        optional=(*_EVERY_ROW, "title", *_AD),
        make=_queries_row,
        answer={"queries": [_ANY] * QUERIES_WANTED, "reasons": [_ANY] * QUERIES_WANTED, "reasoning": None},
    ),
    AdsTask.next_advertiser: Form(
        required=("user", "advertiser"),
        optional=(*_EVERY_ROW, "pool", *_USER),
        make=_next_row,
        answer={"advertiser": _ANY, "reasoning": None},
    ),
    AdsTask.next_advertiser_ranking: Form(
        required=("user", "advertiser", "advertisers"),
        optional=(*_EVERY_ROW, "interests", "pool", *_USER),
        make=_next_row,
        answer={"advertiser": _ANY, "advertisers": [_ANY], "interests": None, "reasoning": None},
    ),
    AdsTask.user_profile: Form(
        required=("user", "summary"),
        optional=(*_EVERY_ROW, "interests", "intents", "constraints", "avoid", *_USER),
        make=_profile_row,
        answer={"summary": _ANY, **dict.fromkeys(("interests", "intents", "constraints", "avoid", "reasoning"))},
    ),
    AdsTask.model_comparison: Form(
        required=("request", "current", "new", "risk", "verdict"),
        optional=(*_EVERY_ROW, "strengths", "weaknesses"),
        make=_comparison_row,
        choices={"risk": tuple(Risk), "verdict": tuple(Verdict)},
        answer={
            "risk": str(next(iter(Risk))),
            "verdict": str(next(iter(Verdict))),
            **dict.fromkeys(("strengths", "weaknesses", "reasoning")),
        },
    ),
    AdsTask.ad_rewriting: Form(
        required=("title", "new_title", "new_text", "rationale"),
        optional=(*_EVERY_ROW, *_AD, "keywords", "goal", "new_keywords"),
        make=_rewriting_row,
        answer={**dict.fromkeys(("new_title", "new_text", "rationale"), _ANY), "new_keywords": None, "reasoning": None},
    ),
}
"""What can be read from a table with one row an example."""
