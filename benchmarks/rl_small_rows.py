"""Rows that the track ``advertiser`` of ``benchmarks.rl_small`` learns from before it is reinforced.

The simulator could tell the best ranking of each user. A team knows less: whom a user did buy from next, and whom
people buy from. So the form is learned from names drawn evenly, and fine-tuning sees one true name, alone or in front
of names that are drawn as often as people buy from them. Lists are of any length up to what is asked for.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ads.config.recipes import load_recipe
from megatron_ads.data.corpus import Corpus, read_corpus
from megatron_ads.distillation.questions import write_rows
from megatron_ads.distillation.teacher_answers import answered_with
from megatron_ads.rows import ChatRow
from megatron_ads.tasks.answer_format import render_reasoned
from megatron_ads.tasks.next_advertiser import RANKED, Ranking, ranking_answer
from megatron_ads.tasks.registry import read_answer


def write_rows_of_logs(folder: Path, ranking: Sequence[str], single: Sequence[str]) -> dict[str, Any]:
    """Write ``forms.jsonl``, ``singles.jsonl`` and ``lists.jsonl`` in ``folder``, of users that are not held out.

    Args:
        folder: Where to.
        ranking: Settings of the rows that ask for a ranking; they decide who is held out.
        single: Settings of the rows that ask for one advertiser.
    """
    asked = _corpus(ranking)
    rows, held_out = asked.training[0], {row.group for row in asked.validation}
    bought = Counter(row.label or "" for row in rows)
    names = sorted(bought)
    popularity = np.array([bought[name] for name in names]) / len(rows)
    draw = np.random.default_rng(0)
    singles = _corpus([*single, "data.validation_rows=0"]).training[0]
    write_rows(folder / "forms.jsonl", [_listing(row, _drawn(names, None, draw)) for row in rows])
    write_rows(folder / "singles.jsonl", [row for row in singles if row.group not in held_out])
    lists = [_listing(row, _behind(row.label or "", _drawn(names, popularity, draw))) for row in rows]
    write_rows(folder / "lists.jsonl", lists)
    return {"rows": len(rows), "names": len(names)}


def _corpus(section: Sequence[str]) -> Corpus:
    return read_corpus(load_recipe("sft/small", section, sections=["data"]).data)


def _drawn(names: Sequence[str], shares: NDArray[np.float64] | None, draw: np.random.Generator) -> list[str]:
    """Return different names, 1 to as many as are asked for."""
    count = int(draw.integers(1, RANKED + 1))
    return [names[number] for number in draw.choice(len(names), count, replace=False, p=shares)]


def _behind(first: str, others: Sequence[str]) -> list[str]:
    """Return as many names as ``others``, ``first`` in front."""
    return [first, *[name for name in others if name != first][: len(others) - 1]]


def _listing(row: ChatRow, names: Sequence[str]) -> ChatRow:
    """Return the row answered with these names, and its own interests."""
    best = read_answer(row, row.target)
    assert isinstance(best, Ranking)
    return answered_with(row, render_reasoned("", ranking_answer(names, best.interests)))
