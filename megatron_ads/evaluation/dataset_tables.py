"""Tables of all datasets of a task in one, as the papers have them, and as text for the terminal."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_ads.evaluation.score_tables import score_tables
from megatron_ads.evaluation.table_form import ScoreTable
from megatron_ads.reporting.page import text_table


def task_tables(datasets: Mapping[str, Mapping[str, Any]]) -> dict[str, list[ScoreTable]]:
    """Return the tables of each task; ``datasets`` are the ``task_scores`` of an evaluation."""
    tasks: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for scores in datasets.values():
        tasks[scores["task"]].append(scores)
    return {task: _together(of_task) for task, of_task in tasks.items()}


def text_tables(scores: Mapping[str, Any]) -> str:
    """Return all tables as text, those of a task under one another."""
    seconds = "" if scores["seconds"] is None else f", {scores['seconds']:.0f} s"
    parts = [f"{scores['rows']} held-out rows answered{seconds}"]
    for tables in task_tables(scores["tasks"]).values():
        for table in tables:
            note = [f"  {line}" for line in table.note.splitlines()]
            parts.append("\n".join([table.title, *text_table(table.rows, table.head, left=table.head), *note]))
    for domain, of_domain in scores["general"].items():
        parts.append(f"{domain}: perplexity {of_domain['perplexity']:.3f} of the targets of {of_domain['rows']} rows")
    return "\n\n".join(parts)


def _together(datasets: Sequence[Mapping[str, Any]]) -> list[ScoreTable]:
    """Return the tables of a task, those of several datasets in one where their columns are the same."""
    if len(datasets) == 1:
        return score_tables(datasets[0])
    alike: dict[tuple[str, ...], list[tuple[str, ScoreTable]]] = defaultdict(list)
    for scores in datasets:
        for table in score_tables(scores):
            alike[table.name, *table.head].append((str(scores["dataset"]), table))
    return [_joined(tables) for tables in alike.values()]


def _joined(tables: Sequence[tuple[str, ScoreTable]]) -> ScoreTable:
    """Return one table whose first column has the dataset where it begins, and below what is told of it."""
    rows = []
    for dataset, table in tables:
        told = [dataset, *(part for part in table.of.split(", ") if part and part != dataset)]
        height = max(len(told), len(table.rows))
        beside = [*told, *[""] * (height - len(told))]
        lines = [*table.rows, *[[""] * len(table.head)] * (height - len(table.rows))]
        rows += [[first, *line] for first, line in zip(beside, lines, strict=True)]
    notes = [f"{dataset}: {table.note}" for dataset, table in tables if table.note]
    name, head = tables[0][1].name, tables[0][1].head
    return ScoreTable(name, ["dataset", *head], rows, "\n".join(notes), labels=1 + tables[0][1].labels)
