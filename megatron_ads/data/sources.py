"""The sources a recipe can name under ``data.sources``, read into chat rows."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from megatron_ads.config.data import AdsTask, SourceConfig, SourceKind
from megatron_ads.data import next_brand
from megatron_ads.data.ads_pairs import DEFAULT_ROWS, builtin_rows
from megatron_ads.data.bad_rows import RowReader
from megatron_ads.data.event_tables import ANSWER_DAYS, event_rows, histories_of, read_anchors
from megatron_ads.data.jsonl import jsonl_reader, jsonl_rows
from megatron_ads.data.own_tables import Users, table_reader, table_rows
from megatron_ads.data.preference_rows import preference_reader, preference_rows
from megatron_ads.data.public_data import ESCI_FILE, GSM8K_FILE, esci_rows, gsm8k_rows, locate
from megatron_ads.data.semantic_id_table import TABLE
from megatron_ads.data.simulator import simulated_rows
from megatron_ads.data.source_files import JSON_LINES, TABLES, Part, parts_of
from megatron_ads.data.split import group_of
from megatron_ads.data.user_features import view_chooser
from megatron_ads.data.verl_rows import verl_reader, verl_rows
from megatron_ads.rows import ChatRow
from megatron_ads.tasks.user_history import FULL_VIEW
from megatron_ads.tasks.variants import ask_as


def read_source(source: SourceConfig, *, seed: int) -> list[ChatRow]:
    """Return the rows of one source, asked as its variant.

    Raises:
        DataError: If it cannot be read, or its rows cannot be asked so.
    """
    rows = _READERS[source.kind](source, seed)
    if source.variant is None:
        return rows
    # The same record in another question stays with it, also where only its question says what it is.
    return ask_as([replace(row, group=row.group or group_of(row)) for row in rows], source.variant)


def files_of(source: SourceConfig) -> list[Part]:
    """Return the files that a source reads, in an order of its own; none for generated rows.

    Raises:
        DataError: If there are none where its path says.
    """
    known = source.history.semantic_ids
    of_items = [] if known is None else parts_of(Path(known) / TABLE)
    if source.kind in _PUBLIC:
        return [*parts_of(_public_file(source)), *of_items]
    forms = JSON_LINES if source.kind is SourceKind.jsonl else TABLES
    paths = [path for path in (source.path, source.events) if path is not None]
    return [*(part for path in paths for part in parts_of(Path(path), forms)), *of_items]


def divided(source: SourceConfig, *, answered: bool = True) -> RowReader[Any] | None:
    """Return how a source is read whose files can be read in pieces; None for one that needs all its rows at once.

    Without ``answered``, rows need no answer; what they have in its place says nothing.
    """
    needs_all = source.variant is not None or source.rows is not None or source.anchor_dates
    if needs_all or source.path is None or (answered and source.events is not None):
        return None
    if source.kind is SourceKind.jsonl:
        return jsonl_reader(Path(source.path), answered=answered)
    if source.kind is SourceKind.verl:
        return verl_reader(Path(source.path))
    if source.kind is SourceKind.preference:
        return preference_reader(Path(source.path))
    if source.kind is not SourceKind.table:
        return None
    return table_reader(
        Path(source.path),
        columns=source.columns,
        task=source.task,
        values=_values(source)[0],
        users=_users(source),
        answered=answered,
    )


def _values(source: SourceConfig) -> tuple[dict[str, dict[Any, Any]], dict[str, dict[Any, Any]]]:
    """Return what values of the rows, and of their log of events, stand for."""
    of_events = {name: values for name, values in source.values.items() if name in source.event_columns}
    return {name: values for name, values in source.values.items() if name not in of_events}, of_events


def _users(source: SourceConfig) -> Users:
    """Return what gives the users of a table's rows: the rows themselves, and a log of events where there is one."""
    users = Users(view_of=view_chooser(source.history))
    if source.events is None:
        return users
    aside = None if source.rejected is None else Path(f"{source.rejected}.events")
    history_of = histories_of(
        Path(source.events), columns=source.event_columns, values=_values(source)[1], rejected=aside
    )
    return replace(users, history_of=history_of)


def _read_simulator(source: SourceConfig, seed: int) -> list[ChatRow]:
    assert source.task is not None, "checked with the recipe"
    count = simulated_rows.DEFAULT_ROWS if source.rows is None else source.rows
    view_of = view_chooser(source.history, _VIEWS[source.kind])
    return [
        example.row for example in simulated_rows.simulated_examples(source.task, count, seed=seed, view_of=view_of)
    ]


def _read_next_brand(source: SourceConfig, seed: int) -> list[ChatRow]:
    task, view_of = source.task or AdsTask.next_advertiser, view_chooser(source.history, _VIEWS[source.kind])
    return next_brand.next_brand_rows(_public_file(source), task, view_of=view_of, limit=source.rows)


def _read_own(source: SourceConfig, seed: int) -> list[ChatRow]:
    assert source.path is not None, "checked with the recipe"
    path, limit = Path(source.path), source.rows
    rejected = None if source.rejected is None else Path(source.rejected)
    if source.kind is SourceKind.jsonl:
        return jsonl_rows(path, limit=limit, rejected=rejected)
    if source.kind is SourceKind.verl:
        return verl_rows(path, limit=limit, rejected=rejected)
    if source.kind is SourceKind.preference:
        return preference_rows(path, limit=limit, rejected=rejected)
    view_of = view_chooser(source.history)
    settings: dict[str, Any] = {"columns": source.columns, "limit": limit, "rejected": rejected}
    if source.anchor_dates:
        anchors = read_anchors(source.anchor_dates, source.anchor_spacing_days)
        settings |= {"answer_days": source.answer_days or ANSWER_DAYS, "values": source.values}
        return event_rows(path, anchors=anchors, view_of=view_of, **settings)
    settings["values"], users = _values(source)[0], _users(source)
    return table_rows(path, task=source.task, users=users, **settings)


_VIEWS = {SourceKind.simulator: simulated_rows.DEFAULT_VIEW, SourceKind.next_brand: next_brand.DEFAULT_VIEW}
"""How much of a history prompts show where a recipe leaves it open; those of other kinds show all."""
_PUBLIC = {SourceKind.esci: ESCI_FILE, SourceKind.gsm8k: GSM8K_FILE, SourceKind.next_brand: next_brand.FILE}


def _public_file(source: SourceConfig) -> Path:
    return locate(source.path, _PUBLIC[source.kind], kind=source.kind)


_READERS: dict[SourceKind, Callable[[SourceConfig, int], list[ChatRow]]] = {
    SourceKind.builtin: lambda source, seed: builtin_rows(
        DEFAULT_ROWS if source.rows is None else source.rows, seed=seed
    ),
    SourceKind.simulator: _read_simulator,
    SourceKind.esci: lambda source, seed: esci_rows(_public_file(source), limit=source.rows),
    SourceKind.gsm8k: lambda source, seed: gsm8k_rows(_public_file(source), limit=source.rows),
    SourceKind.next_brand: _read_next_brand,
    SourceKind.jsonl: _read_own,
    SourceKind.table: _read_own,
    SourceKind.verl: _read_own,
    SourceKind.preference: _read_own,
}


def without_section(source: SourceConfig, section: str) -> SourceConfig:
    """Return a source whose prompts leave one more section of the users' histories out."""
    left_out = source.history.without
    if left_out is None:
        left_out = sorted(_VIEWS.get(source.kind, FULL_VIEW).without)
    return replace(source, history=replace(source.history, without=[*left_out, section]))


def source_names(sources: Sequence[SourceConfig]) -> list[str]:
    """Return what results call each source: its name, its file's or its kind, numbered where that is not enough."""
    given = {source.name for source in sources if source.name is not None}
    names: list[str] = []
    for source in sources:
        plain = source.name or (Path(source.path).name.split(".")[0] if source.path else "") or str(source.kind)
        taken = {*names, *given} - {source.name}
        numbered = (f"{plain} {number}" for number in count(2))
        names.append(plain if plain not in taken else next(name for name in numbered if name not in taken))
    return names


def describe_source(source: SourceConfig) -> str:
    """Return what a report says the data were."""
    path = _public_file(source) if source.kind in _PUBLIC else source.path
    described = {
        SourceKind.builtin: "built-in query-ad pairs",
        SourceKind.simulator: f"simulated ads business: {source.task}",
        SourceKind.esci: f"ESCI query-product pairs ({path})",
        SourceKind.gsm8k: f"GSM8K questions ({path})",
        SourceKind.next_brand: f"office purchases, {source.task or AdsTask.next_advertiser} ({path})",
        SourceKind.table: f"own rows, {source.task or 'chat'} ({path})",
        SourceKind.jsonl: f"chat rows ({path})",
        SourceKind.verl: f"rows in verl's form ({path})",
        SourceKind.preference: f"preferences ({path})",
    }[source.kind]
    return described if source.variant is None else f"{described}, asked as {source.variant}"
