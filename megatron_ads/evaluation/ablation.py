"""What a model loses without a section of users' histories: the advertiser paper's feature ablation (table 4).

The same model answers the same held-out rows again, each time with one section left out of the prompts that show it;
answers to the others stay. For a model that is trained without the section, too, set ``history.without`` in its recipe.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_ads.config.data import DataConfig
from megatron_ads.data.corpus import read_corpus
from megatron_ads.data.sources import source_names, without_section
from megatron_ads.errors import ConfigError, DataError
from megatron_ads.evaluation.answer_records import Answer
from megatron_ads.evaluation.comparison import deltas
from megatron_ads.evaluation.datasets import dataset_names
from megatron_ads.evaluation.ranking_scores import LONGEST
from megatron_ads.rows import ChatRow, Fact
from megatron_ads.tasks.user_history import Section, shown_history

_Key = tuple[str, str, str]


def rows_without_sections(data: DataConfig, rows: Sequence[ChatRow]) -> dict[Section, list[ChatRow]]:
    """Return, by section, the held-out rows that show it, without it; sections that no row shows are left out.

    Raises:
        ConfigError: If no row shows a user's history that a setting decides on.
        DataError: If a row is not there without a section, or not the only one of its id.
    """
    decided = {name: source.shows_users for name, source in zip(source_names(data.sources), data.sources, strict=True)}
    shown = {
        _key(row): shown_history(row)
        for row in rows
        if Fact.history in row.facts and decided.get(row.source, any(decided.values()))
    }
    used = Counter(section for sections in shown.values() for section in sections)
    if not used:
        raise ConfigError(
            "--ablate-history has no effect: no held-out row shows a user's history that data.sources[i].history "
            "decides on. Leave it out."
        )
    found = {}
    for section in (section for section in Section if used[section]):
        sources = [without_section(source, section) if source.shows_users else source for source in data.sources]
        corpus = read_corpus(replace(data, sources=sources))
        everything = (row for of_source in (*corpus.training, corpus.validation) for row in of_source)
        wanted = [row for row in rows if section in shown.get(_key(row), ())]
        found[section] = _same_rows(wanted, everything, section)
    return found


def add_ablations(
    scores: Mapping[str, dict[str, Any]], answers: Sequence[Answer], without: Mapping[Section, Sequence[Answer]]
) -> None:
    """Add to the scores of each dataset an ``ablation``: by section and metric, the scores with and without it.

    Args:
        scores: By dataset; they are added to.
        answers: To all rows as they are.
        without: Answers to the rows of ``rows_without_sections``.
    """
    datasets: dict[str, list[Answer]] = defaultdict(list)
    for answer, dataset in zip(answers, dataset_names([answer.row for answer in answers]), strict=True):
        datasets[dataset].append(answer)
    for dataset, full in datasets.items():
        if dataset not in scores:
            continue
        wanted = min(LONGEST, scores[dataset].get("ranking", {}).get("valid_names", LONGEST))
        ablation = {}
        for section, others in without.items():
            by_key = {_key(answer.row): answer for answer in others}
            ablated = [by_key.get(_key(answer.row), answer) for answer in full]
            if any(one is not answer for one, answer in zip(ablated, full, strict=True)):
                ablation[str(section)] = {
                    name: {"without": of.pop("model"), "full": of.pop("compared"), **of}
                    for name, of in deltas(ablated, full, wanted=wanted).items()
                }
        if ablation:
            scores[dataset]["ablation"] = ablation


def _same_rows(wanted: Sequence[ChatRow], rows: Iterable[ChatRow], section: Section) -> list[ChatRow]:
    """Return the rows of the same ids, with the sources that results know them by."""
    merged = not any(row.source for row in wanted)
    by_key: dict[_Key, list[ChatRow]] = defaultdict(list)
    for row in rows:
        by_key[_key(replace(row, source="") if merged else row)].append(row)
    for row in wanted:
        if len(found := by_key[_key(row)]) != 1:
            raise DataError(
                f"row {row.id!r:.80} of {row.task} is there {len(found)} times without {section}, so that answers "
                "cannot be compared. Give each row of a source an id of its own."
            )
    return [replace(by_key[_key(row)][0], source=row.source) for row in wanted]


def _key(row: ChatRow) -> _Key:
    return row.task, row.source, row.id
