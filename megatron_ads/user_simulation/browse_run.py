"""`users browse` from start to end: recommenders, visits, five figures and how far they agree with the truth."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ads.config.user_simulation import BrowseConfig
from megatron_ads.reporting.page import fixed
from megatron_ads.user_simulation.browsing import AdServer, BrowsingUsers, browse
from megatron_ads.user_simulation.business import Business, open_business
from megatron_ads.user_simulation.figures import FIGURES, TRUTHS, Measured, agreement, averages, measure, true_values
from megatron_ads.user_simulation.language_users import LanguageUsers
from megatron_ads.user_simulation.players import Player, open_player
from megatron_ads.user_simulation.recommenders import RankerSettings, best_ranking, rankings
from megatron_ads.user_simulation.reports import Pages, Table, scored
from megatron_ads.user_simulation.scripted_users import ScriptedUsers, expected_wants

BEST = "best reachable"
"""The order by the true probabilities; no recommender, and left out of the agreement."""


def run_browse(config: BrowseConfig) -> dict[str, Any]:
    """Let users browse and return the report, as JSON values.

    Raises:
        ConfigError: If a folder cannot be written, or no request to the model can succeed.
        DataError: If logs, pipeline or answers cannot be used, or the model stopped answering.
    """
    out = Path(config.out)
    with open_player(config.model, out, seed=config.seed) as player:  # first: it is refused before anything is trained
        business = open_business(config.world, out, simulated=config.simulated)
        settings = RankerSettings(seed=config.seed, factors=config.factors, answers=config.answers)
        everything = {**rankings(business, config.recommenders, settings), BEST: best_ranking(business)}
        ranked = {name: ranking[:, : config.pages * config.page_size] for name, ranking in everything.items()}
        server = AdServer(business.world, config.seed)
        ads = {name: server.ads(business.users.names, ranking) for name, ranking in ranked.items()}
        users = _users(business, config, player)
        visits = browse(ads, users, pages=config.pages, page_size=config.page_size)
        want_UD = expected_wants(business.world, business.users.moment)
        truths = {
            name: true_values(ranking, ads[name], business.users.chance_UA, want_UD, config)
            for name, ranking in ranked.items()
        }
        return _report(measure(visits, truths), config, player)


def _users(business: Business, config: BrowseConfig, player: Player | None) -> BrowsingUsers:
    scripted = ScriptedUsers(business.world, business.users, config)
    if player is None:
        return scripted
    return LanguageUsers(business.world, business.users, scripted.need_U.tolist(), player, config)


def _report(measured: Measured, config: BrowseConfig, player: Player | None) -> dict[str, Any]:
    names = [name for name in measured.by_recommender if name != BEST]
    return {
        "users": config.simulated,
        "played_by": config.model.model or "scripted rules",
        "pages": config.pages,
        "page_size": config.page_size,
        "recommenders": averages(measured),
        "agreement": {truth: agreement(measured, names, truth) for truth in TRUTHS},
        "unreadable": {name: dict(reasons) for name, reasons in measured.unreadable.items()},
        "usage": player.usage() if player is not None else None,
    }


_TITLES = {
    "view_ratio": "view ratio", "clicks": "clicks", "click_ratio": "click ratio", "exit_page": "exit page",
    "satisfaction": "satisfaction", "utility": "true utility", "next_conversion": "true next conversion",
}  # fmt: skip
_DIGITS = {"exit_page": 2, "satisfaction": 2, "clicks": 2, "utility": 4, "click_ratio": 4}


def browse_pages(report: Mapping[str, Any]) -> Pages:
    """Return what people read of a report."""
    rows = [
        [name, *(scored(of_one[column], _DIGITS.get(column, 3)) for column in (*FIGURES, *TRUTHS))]
        for name, of_one in report["recommenders"].items()
    ]
    taus = [
        [
            f"{_TITLES[figure]} and {_TITLES[truth]}",
            scored({"value": found["tau"], "interval": found["interval"]}, 2), fixed(found["p_value"], 4),
        ]
        for truth, of_truth in report["agreement"].items()
        for figure, found in of_truth.items()
    ]  # fmt: skip
    unreadable = sum((Counter(reasons) for reasons in report["unreadable"].values()), Counter())
    visits = report["users"] * len(report["recommenders"])
    notes = ["Brackets hold bootstrap 95 % intervals over users."]
    if report["usage"] is not None:
        why = "".join(f", {reason} {count:,}" for reason, count in unreadable.most_common())
        ended = (
            f"{unreadable.total():,} of {visits:,} visits ended with an answer of the model that cannot be read{why}."
        )
        notes.append(ended)
    return Pages(
        title="Recommenders, browsed by simulated users",
        lead=f"{report['users']} users, played by {report['played_by']}, with at most {report['pages']} pages of "
        f"{report['page_size']} ads of each recommender.",
        tables=[
            Table("Five figures", ["recommender", *(_TITLES[column] for column in (*FIGURES, *TRUTHS))], rows),
            Table("Order of recommenders: figures and truth", ["pair", "Kendall's tau", "p"], taus),
        ],
        notes=notes,
    )
