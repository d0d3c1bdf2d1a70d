"""A phrase-match task as token rows: does the query, which contains the keyword, extend it or ask for something else?

    keyword | query | answer          running shoes | red running shoes sale | yes
                                      running shoes | running shoes repair   | no

Words put around the keyword narrow it (yes) or, if one of them changes what is asked for, do not extend it (no). Some
words do the one next to goods and the other next to services, so the keyword has to be read. One label in 33 is wrong,
as among raters, which keeps the best possible area under the curve near 0.97.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SEPARATOR, ANSWER, YES, NO = range(4)
GOODS = (
    "running shoes",
    "phone case",
    "desk lamp",
    "coffee maker",
    "winter coat",
    "office chair",
    "tea pot",
    "bike lock",
)
SERVICES = ("car wash", "house cleaning", "dog walking", "tax advice", "piano lessons", "web design", "lawn care")
NARROWING = ("red", "cheap", "best", "large", "new", "sale", "brand", "review")
CHANGING = ("repair", "jobs", "drawing", "history", "pattern", "museum", "lyrics", "recycling")
BY_KIND = ("online", "course", "certified", "franchise", "delivery", "gift")
"""Narrows a service and changes what is asked for next to goods."""
_WORDS = sorted({word for phrase in GOODS + SERVICES for word in phrase.split()} | {*NARROWING, *CHANGING, *BY_KIND})
TOKEN = {word: number for number, word in enumerate(_WORDS, start=4)}
VOCABULARY = 4 + len(_WORDS)
WRONG_LABELS = 1 / 33
LENGTH = 9
"""Tokens of a pair: a keyword of two words, the separator, the keyword with up to three words around it, the answer."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs of one length, (N, LENGTH); the token at the last place is ``ANSWER`` and the next is to be predicted."""

    tokens_NS: Tensor
    labels_N: Tensor
    """``YES`` or ``NO``."""

    def shuffled_labels(self, generator: torch.Generator) -> "Pairs":
        """Return the pairs with the labels dealt anew, which leaves nothing to learn."""
        return Pairs(self.tokens_NS, self.labels_N[torch.randperm(len(self.labels_N), generator=generator)])

    def batch(self, step: int, size: int) -> "Pairs":
        """Return the pairs of one training step."""
        place = slice(step * size, (step + 1) * size)
        return Pairs(self.tokens_NS[place], self.labels_N[place])


def draw_pairs(count: int, *, seed: int) -> Pairs:
    """Draw ``count`` pairs; the same seed gives the same pairs."""
    generator = torch.Generator().manual_seed(seed)
    rows = [_draw(generator) for _ in range(count)]
    return Pairs(torch.tensor([tokens for tokens, _ in rows]), torch.tensor([label for _, label in rows]))


def _draw(generator: torch.Generator) -> tuple[list[int], int]:
    def pick(words: tuple[str, ...]) -> str:
        return words[int(torch.randint(len(words), (1,), generator=generator))]

    def chance(probability: float) -> bool:
        return float(torch.rand((), generator=generator)) < probability

    service = chance(0.5)
    keyword = pick(SERVICES if service else GOODS)
    around = [pick(NARROWING), pick(NARROWING), pick(NARROWING)]
    turn = pick(BY_KIND) if chance(0.4) else pick(CHANGING) if chance(0.5) else pick(NARROWING)
    around[int(torch.randint(3, (1,), generator=generator))] = turn
    extends = turn in NARROWING or (service and turn in BY_KIND)
    query = [around[0], *keyword.split(), *around[1:]]
    words = [*keyword.split(), *query]
    tokens = [TOKEN[word] for word in words]
    label = YES if extends != chance(WRONG_LABELS) else NO
    return [*tokens[:2], SEPARATOR, *tokens[2:], ANSWER], label
