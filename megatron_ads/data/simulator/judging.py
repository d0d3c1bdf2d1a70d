"""What is right to answer: raters of the simulated world judge by fixed rules, and now and then make a slip.

Query-ad relevance:

    Bad   if the ad's text is spam, or it offers neither the kind nor one that can stand in for it, or another place;
    Fair  else, if it offers what can stand in, or is misspelt, or a brand, price level or detail asked for differs;
    Good  else.

Ad-user relevance, from the user's searches and conversions:

    0 if the ad serves another place only, or the user never searched for anything of its department;
    1 if the user searched for something of the department, but not for the ad's kind;
    2 if the user searched for the ad's kind;
    and from 1 on, one more if the user bought from the advertiser or the ad's price level is the user's.

A rater's slip moves a label to a neighbour on its scale, so the best that anybody can reach is to state the rule's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_ads.data.simulator.histories import SimulatedUser
from megatron_ads.data.simulator.vocabulary import DEPARTMENTS, KINDS, PLACES, PRICES, Wanted
from megatron_ads.data.simulator.world import CLEAN, SPAM, AdFacts, World, close_kind, department_of
from megatron_ads.rows import ChatRow, Fact
from megatron_ads.tasks.relevance import Flag, Label

SLIP = 0.04
"""Share of labels that raters move to a neighbour on the scale."""
TEXT_WORDS = ("clean", "misspelt", "spam")


@dataclass(frozen=True, slots=True)
class Example:
    """A row and what is best to answer to it."""

    row: ChatRow
    best: tuple[str, ...]
    """Answers as the row's ``label`` would be written (without a label: as its target), the most likely first."""
    chances: tuple[float, ...]
    """Probability that each of ``best`` is the label that the simulation drew, given all that a prompt can show."""

    def __post_init__(self) -> None:
        if self.row.label is not None:
            facts = {**self.row.facts, Fact.best_answers: list(self.best)}
            object.__setattr__(self, "row", replace(self.row, facts=facts))


def reachable_recall(examples: Sequence[Example], most: int) -> float:
    """Return the expected share of rows whose label is among the first ``most`` of the best answers.

    With ``most`` = 1 it is the best reachable accuracy. The labels that were drawn give a little more or less.
    """
    return sum(sum(example.chances[:most]) for example in examples) / len(examples)


@dataclass(frozen=True, slots=True)
class PairJudgement:
    """What the rule says of a query and an ad."""

    label: Label
    location: Flag
    quality: Flag
    reasoning: str


def judge_pair(wanted: Wanted, ad: AdFacts, world: World) -> PairJudgement:
    """Apply the rule for a query and an ad; the reasoning stops at the first thing that makes the ad Bad."""
    steps = [f"Text: {TEXT_WORDS[ad.text]}."]
    label = {CLEAN: Label.good, SPAM: Label.bad}.get(ad.text, Label.fair)
    for name, asked, given, verdict in _comparisons(wanted, ad, world):
        if label is Label.bad:
            break
        steps.append(f"{name}: {asked} vs {given}, {_VERDICTS[verdict]}.")
        label = min(label, verdict, key=_ORDER.index)
    return PairJudgement(
        label=label,
        location=Flag.good if _place_fits(wanted, ad) else Flag.bad,
        quality=Flag.good if ad.text == CLEAN else Flag.bad,
        reasoning=" ".join(steps),
    )


_ORDER = (Label.bad, Label.fair, Label.good)
_VERDICTS = {Label.bad: "wrong", Label.fair: "close", Label.good: "fits"}


def _place_fits(wanted: Wanted, ad: AdFacts) -> bool:
    return wanted.place is None or ad.place in (None, wanted.place)


def _comparisons(wanted: Wanted, ad: AdFacts, world: World) -> Iterator[tuple[str, str, str, Label]]:
    """Yield name, asked, offered and the best label that still is possible, for everything asked for."""
    kind = Label.good if ad.kind == wanted.kind else Label.fair if ad.kind == close_kind(wanted.kind) else Label.bad
    yield "Kind", KINDS[wanted.kind].name, KINDS[ad.kind].name, kind
    if wanted.place is not None:
        given = "anywhere" if ad.place is None else PLACES[ad.place]
        yield "Place", PLACES[wanted.place], given, Label.good if _place_fits(wanted, ad) else Label.bad
    desirable: list[tuple[str, str, str]] = []
    if wanted.brand is not None:
        desirable.append(("Brand", world.brand_names[wanted.brand], world.brand_names[ad.brand]))
    if wanted.price is not None:
        desirable.append(("Price", PRICES[wanted.price], PRICES[ad.price]))
    if wanted.detail is not None:
        desirable.append(("Detail", detail_words(wanted.kind, wanted.detail), detail_words(ad.kind, ad.detail)))
    for name, asked, given in desirable:
        yield name, asked, given, Label.good if asked == given else Label.fair


def detail_words(kind: int, detail: int) -> str:
    """Return a detail as searchers word it."""
    return DEPARTMENTS[department_of(kind)].details[detail][0]


def judge_for_user(user: SimulatedUser, ad: AdFacts) -> tuple[int, str]:
    """Apply the rule for a user and an ad; return the score from 0 to 3 and the reasoning."""
    offered = KINDS[ad.kind].name
    department = DEPARTMENTS[department_of(ad.kind)].name
    if ad.place is not None and ad.place != user.place:
        return 0, f"The ad serves {PLACES[ad.place]}, the user is in {PLACES[user.place]}."
    searched = {kind for _, kind in user.needs}
    if ad.kind in searched:
        score, step = 2, f"The user searched for {offered}."
    elif any(department_of(kind) == department_of(ad.kind) for kind in searched):
        score, step = 1, f"The user searched for other {department}, not {offered}."
    else:
        return 0, f"The ad offers {offered}. The user searched for nothing of {department}."
    known, priced = ad.advertiser in user.bought_from, ad.price == user.price
    steps = [step, "Bought there before." if known else "Never bought there.",
             f"Price level {PRICES[ad.price]}, the user's is {PRICES[user.price]}."]  # fmt: skip
    return score + int(known or priced), " ".join(steps)


def slip(place: int, scale: int, draw: np.random.Generator) -> int:
    """Return what a rater writes down for the label at ``place`` of ``scale`` labels."""
    if draw.random() >= SLIP:
        return place
    neighbours = [other for other in (place - 1, place + 1) if 0 <= other < scale]
    return neighbours[int(draw.integers(len(neighbours)))]
