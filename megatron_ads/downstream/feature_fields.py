"""Features of users as categorical fields of a ranking model, for every impression.

    advertisers   predicted ones; the i-th counts 1 / log2(1 + i)
    interests     as advertisers
    place         where the item is among the predicted advertisers: 1, 2, 3-5, 6-10, 11-, or not there
    codes         one word of each part, "part=code"
    events        of the similar user; the i-th counts 1 / log2(1 + i)
    their item    whether the similar user bought from the item, only saw it, or neither

``place`` and ``their item`` cross a feature with the item (ours): a ranker that has seen few impressions of a pair of
names learns from them what any pair of equal names means.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from sklearn.feature_extraction import FeatureHasher
from sklearn.preprocessing import normalize

from megatron_ads.downstream.examples import Examples
from megatron_ads.downstream.features import UserFeatures
from megatron_ads.downstream.logs import Item
from megatron_ads.downstream.ranker import Field
from megatron_ads.downstream.words import Word
from megatron_ads.metrics.ranking import same_name


class FeatureGroup(StrEnum):
    """Features that are tried with and without."""

    predicted = "predicted"
    """Advertisers and interests, by name (advertiser paper)."""
    codes = "codes"
    """Product-quantised codes (Taiji, within the user)."""
    similar = "similar"
    """The similar user's events (Taiji, across users)."""


_PLACES = (1, 2, 5, 10)


class FeatureFields:
    """The fields of some examples. All have the same number of words, whichever features are used."""

    def __init__(
        self, examples: Examples, features: Sequence[UserFeatures], items: Sequence[Item], *, buckets: int
    ) -> None:
        """Take examples, the features of each of their histories, and how many words are told apart."""
        self._history_N = np.array([number for number, _ in examples.impressions], dtype=np.int64)
        self._names = [same_name(items[shown.item].name) for _, shown in examples.impressions]
        self._bags = [(group, _hashed([words_of(one) for one in features], buckets)) for group, words_of in _OF_USER]
        self._said = [(group, [said_of(one) for one in features], values) for group, said_of, values in _OF_ITEM]

    def of(self, groups: frozenset[FeatureGroup], whose_H: NDArray[np.int64]) -> list[Field]:
        """Return the fields of the impressions, in their order; fields of other groups are empty everywhere.

        Args:
            groups: Which features are used.
            whose_H: Number of the history whose features each history has: its own, or another for comparison.
        """
        whose_N = whose_H[self._history_N]
        fields = [
            Field(bags if group in groups else csr_matrix(bags.shape, dtype=bags.dtype), whose_N)
            for group, bags in self._bags
        ]
        for group, said, values in self._said:
            found = [values] * len(whose_N)
            if group in groups:
                found = [said[whose].get(name, values - 1) for whose, name in zip(whose_N, self._names, strict=True)]
            one_word_each = csr_matrix(np.eye(values + 1, values, dtype=np.float32))  # the last row has none
            fields.append(Field(one_word_each, np.array(found, dtype=np.int64)))
        return fields


def _hashed(bags: Sequence[Sequence[Word]], buckets: int) -> csr_matrix:
    hasher = FeatureHasher(n_features=buckets, input_type="pair", alternate_sign=False, dtype=np.float32)
    hashed: csr_matrix = normalize(hasher.transform(bags))
    return hashed


def _falling(words: Sequence[str]) -> Iterator[Word]:
    for place, word in enumerate(words, 1):
        yield f"={word}", 1 / math.log2(1 + place)


def _advertisers(one: UserFeatures) -> list[Word]:
    return list(_falling([same_name(name) for name in one.advertisers]))


def _interests(one: UserFeatures) -> list[Word]:
    return list(_falling([same_name(name) for name in one.interests]))


def _codes(one: UserFeatures) -> list[Word]:
    return [(f"{part}={code}", 1.0) for part, code in enumerate(one.codes)]


def _events(one: UserFeatures) -> list[Word]:
    return list(_falling([same_name(event) for event in one.similar_events]))


_OF_USER = (
    (FeatureGroup.predicted, _advertisers),
    (FeatureGroup.predicted, _interests),
    (FeatureGroup.codes, _codes),
    (FeatureGroup.similar, _events),
)


def _places(one: UserFeatures) -> dict[str, int]:
    """Return the range, from 0, that the place of each predicted advertiser is in."""
    return {same_name(name): sum(place > end for end in _PLACES) for place, name in enumerate(one.advertisers, 1)}


def _theirs(one: UserFeatures) -> dict[str, int]:
    """Return 0 for names that the similar user bought from, 1 for those only seen; 2 stands for all others."""
    found: dict[str, int] = {}
    for event in one.similar_events:
        did, _, name = event.partition("=")
        if did != "wanted":
            number = 0 if did == "bought" else 1
            found[same_name(name)] = min(number, found.get(same_name(name), 1))
    return found


_OF_ITEM: tuple[tuple[FeatureGroup, Callable[[UserFeatures], dict[str, int]], int], ...] = (
    (FeatureGroup.predicted, _places, len(_PLACES) + 2),
    (FeatureGroup.similar, _theirs, 3),
)
"""What a feature says of an item, by name, as a number below the last one, which stands for names that it lacks."""
