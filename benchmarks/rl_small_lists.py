"""What of a gain in recall is the length of lists: they are cut to one length, and filled up with popular names."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from megatron_ads.metrics.ranking import each_once, most_popular, position_of, recall_at
from megatron_ads.tasks.next_advertiser import RANKED, Ranking, parse_ranking

Lists = Sequence[tuple[str, Sequence[str]]]
"""Of each row the true name, and those of the answer, none of them twice."""


def recalls_by_length(before: Path, after: Path, singles: Path) -> dict[str, float]:
    """Return recall@20 of two models' answers to the same rows, had their lists been longer or shorter.

    Args:
        before: Answers of the model that is improved on, as ``megatron-ads evaluate`` writes them.
        after: Of the other.
        singles: Rows whose labels say what is popular.
    """
    popular = most_popular([record["label"] for record in _records(singles)], RANKED)
    shorter, longer = _lists(before), _lists(after)
    cut = [(true, names[: len(own)]) for (true, names), (_, own) in zip(longer, shorter, strict=True)]
    return {
        "SFT + GRPO, cut to the length of SFT's": _recall(cut),
        "SFT, filled up with popular names": _recall(_filled(shorter, popular)),
        "SFT + GRPO, filled up with popular names": _recall(_filled(longer, popular)),
    }


def _records(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _lists(answers: Path) -> Lists:
    read = [(one["expected"], parse_ranking(one["text"], reasoning_required=False)) for one in _records(answers)]
    return [(true, each_once(found.advertisers) if isinstance(found, Ranking) else ()) for true, found in read]


def _filled(lists: Lists, popular: Sequence[str]) -> Lists:
    return [(true, each_once([*names, *popular])[: max(RANKED, len(names))]) for true, names in lists]


def _recall(lists: Lists) -> float:
    return mean(recall_at([position_of(true, names)], RANKED) or 0.0 for true, names in lists)
