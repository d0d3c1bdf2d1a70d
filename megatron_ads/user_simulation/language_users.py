"""Users played by a language model: it is told who it is and what it needs, sees a page of ads, and says what it does.

It plays the same people as the scripted users, with the same needs: what it is told is their true state, in words.
Source: Agent4Rec (arXiv:2310.10108), whose agents have a profile, a memory of the visit, and act page by page.
"""

import json
from collections.abc import Sequence

import numpy as np

from megatron_ads.config.user_simulation import BrowseConfig
from megatron_ads.data.simulator.histories import SHOPPER
from megatron_ads.data.simulator.vocabulary import KINDS, PLACES, PRICES
from megatron_ads.data.simulator.world import World
from megatron_ads.inference.engine import Completion
from megatron_ads.rows import Message, Role
from megatron_ads.user_simulation.browsing import SATISFACTIONS, PageAnswer, Visit
from megatron_ads.user_simulation.latent_users import LatentUsers
from megatron_ads.user_simulation.model_answers import UnreadableError, flag, list_of, read_object, whole_number
from megatron_ads.user_simulation.players import Player

_INTERESTS, _SHOPS, _REMEMBERED = 3, 3, 5

_FORM = (
    "Say which ads the user looks at, which of these it clicks on, how satisfied it is with the visit so far (1 to 5), "
    "and whether it leaves now. Answer with one JSON object and nothing else, such as\n"
    '{"looks": [1, 2], "clicks": [2], "satisfaction": 3, "leaves": false}'
)


def personas(world: World, users: LatentUsers, need_U: Sequence[int]) -> list[str]:
    """Return what a model is told of each user that it plays."""
    moment = users.moment
    found = []
    for user, need in enumerate(need_U):
        who = f"{SHOPPER[PRICES[int(moment.price_U[user])]]} in {PLACES[int(users.place_U[user])]}"
        interests = [KINDS[kind].name for kind in np.argsort(-moment.interest_UK[user], kind="stable")[:_INTERESTS]]
        shops = [world.advertisers[number].name for number in users.latest_advertisers(user, _SHOPS)]
        lines = [f"User: a {who}.", f"Needs today: {KINDS[int(need)].name}.", f"Often needs: {', '.join(interests)}."]
        if shops:
            lines.append(f"Bought lately from: {', '.join(shops)}.")
        found.append("\n".join(lines))
    return found


def page_prompt(persona: str, visit: Visit, world: World, pages: int) -> str:
    """Return what a model is asked about the last page of a visit."""
    clicked = [
        world.ads[page[place]].title
        for page, answer in zip(visit.shown, visit.answers, strict=False)
        for place in answer.clicked
    ][-_REMEMBERED:]
    before = f" Clicked on before: {'; '.join(clicked)}." if clicked else ""
    lines = [f"{number}. {_ad(world, ad)}" for number, ad in enumerate(visit.shown[-1], start=1)]
    return "\n".join(
        [
            "You play a user of a page that shows ads. Decide as this user would.", persona,
            f"Page {len(visit.shown)} of {pages}.{before}", *lines, _FORM,
        ]
    )  # fmt: skip


def _ad(world: World, number: int) -> str:
    ad = world.ads[number]
    return f"{ad.title}, {world.advertisers[ad.advertiser].name}. {ad.description}"


def read_page_answer(said: Completion, ads: int) -> PageAnswer:
    """Return what a model says that its user does on a page of so many ads; unreadable, the user leaves."""
    place = whole_number(1, ads)
    form = {
        "looks": list_of(place, most=ads),
        "clicks": list_of(place, most=ads),
        "satisfaction": whole_number(SATISFACTIONS[0], SATISFACTIONS[-1]),
        "leaves": flag,
    }
    try:
        found = read_object(said, [form])
        if not set(found["clicks"]) <= set(found["looks"]):
            raise UnreadableError("clicks_without_looking")
    except UnreadableError as error:
        return PageAnswer(leaves=True, unreadable=str(error))
    return PageAnswer(
        looked=tuple(number - 1 for number in sorted(found["looks"])),
        clicked=tuple(number - 1 for number in sorted(found["clicks"])),
        leaves=found["leaves"],
        satisfaction=found["satisfaction"],
    )


def write_page_answer(answer: PageAnswer) -> str:
    """Return what a model would have to say for its user to do this."""
    said = {
        "looks": [place + 1 for place in answer.looked],
        "clicks": [place + 1 for place in answer.clicked],
        "satisfaction": answer.satisfaction,
        "leaves": answer.leaves,
    }
    return json.dumps(said)


class LanguageUsers:
    """Plays all users of a business by a model."""

    def __init__(
        self, world: World, users: LatentUsers, need_U: Sequence[int], player: Player, config: BrowseConfig
    ) -> None:
        self._world, self._player, self._pages = world, player, config.pages
        self._personas = personas(world, users, need_U)

    def respond(self, visits: Sequence[Visit]) -> list[PageAnswer]:
        """Return what each user does on the last page, as the model says."""
        prompts = [page_prompt(self._personas[visit.user], visit, self._world, self._pages) for visit in visits]
        said = self._player.say([[Message(Role.user, prompt)] for prompt in prompts])
        return [read_page_answer(one, len(visit.shown[-1])) for one, visit in zip(said, visits, strict=True)]
