"""The sources a recipe can name under ``data.sources``, read into chat rows."""

from pathlib import Path

from megatron_ads.config.data import AdsTask, SourceConfig, SourceKind
from megatron_ads.data import next_brand
from megatron_ads.data.ads_pairs import DEFAULT_ROWS, builtin_rows
from megatron_ads.data.event_tables import event_rows, read_anchor
from megatron_ads.data.jsonl import jsonl_rows
from megatron_ads.data.own_tables import table_rows
from megatron_ads.data.public_data import esci_file, esci_rows, gsm8k_file, gsm8k_rows
from megatron_ads.data.simulator import simulated_rows
from megatron_ads.data.user_features import view_chooser
from megatron_ads.rows import ChatRow
from megatron_ads.tasks.variants import ask_as


def read_source(source: SourceConfig, *, seed: int) -> list[ChatRow]:
    """Return the rows of one source, asked as its variant.

    Raises:
        DataError: If it cannot be read, or its rows cannot be asked so.
    """
    rows = _rows_as_they_are(source, seed)
    return rows if source.variant is None else ask_as(rows, source.variant)


def _rows_as_they_are(source: SourceConfig, seed: int) -> list[ChatRow]:
    if source.kind is SourceKind.builtin:
        return builtin_rows(DEFAULT_ROWS if source.rows is None else source.rows, seed=seed)
    if source.kind is SourceKind.simulator:
        return _simulated_rows(source, seed)
    if source.kind is SourceKind.esci:
        return esci_rows(esci_file(source.path), limit=source.rows)
    if source.kind is SourceKind.gsm8k:
        return gsm8k_rows(gsm8k_file(source.path), limit=source.rows)
    if source.kind is SourceKind.next_brand:
        return next_brand.next_brand_rows(
            next_brand.next_brand_file(source.path),
            source.task or AdsTask.next_advertiser,
            view_of=view_chooser(source.history, next_brand.DEFAULT_VIEW),
            limit=source.rows,
        )
    return _rows_of_a_file(source)


def _rows_of_a_file(source: SourceConfig) -> list[ChatRow]:
    assert source.path is not None, "checked with the recipe"
    file, rejected = Path(source.path), None if source.rejected is None else Path(source.rejected)
    if source.kind is SourceKind.jsonl:
        return jsonl_rows(file, limit=source.rows, rejected=rejected)
    if source.anchor is None:
        return table_rows(file, columns=source.columns, task=source.task, limit=source.rows, rejected=rejected)
    return event_rows(
        file,
        columns=source.columns,
        anchor=read_anchor(source.anchor),
        view_of=view_chooser(source.history),
        limit=source.rows,
        rejected=rejected,
    )


def _simulated_rows(source: SourceConfig, seed: int) -> list[ChatRow]:
    assert source.task is not None, "checked with the recipe"
    count = simulated_rows.DEFAULT_ROWS if source.rows is None else source.rows
    view_of = view_chooser(source.history, simulated_rows.DEFAULT_VIEW)
    examples = simulated_rows.simulated_examples(source.task, count, seed=seed, view_of=view_of)
    return [example.row for example in examples]


def describe_source(source: SourceConfig) -> str:
    """Return what a report says the data were."""
    described = _describe_rows(source)
    return described if source.variant is None else f"{described}, asked as {source.variant}"


def _describe_rows(source: SourceConfig) -> str:
    if source.kind is SourceKind.builtin:
        return "built-in query-ad pairs"
    if source.kind is SourceKind.simulator:
        return f"simulated ads business: {source.task}"
    if source.kind is SourceKind.esci:
        return f"ESCI query-product pairs ({esci_file(source.path)})"
    if source.kind is SourceKind.gsm8k:
        return f"GSM8K questions ({gsm8k_file(source.path)})"
    if source.kind is SourceKind.next_brand:
        return f"office purchases, {source.task or AdsTask.next_advertiser} ({next_brand.next_brand_file(source.path)})"
    if source.kind is SourceKind.table:
        return f"own rows, {source.task or 'chat'} ({source.path})"
    return f"chat rows ({source.path})"
