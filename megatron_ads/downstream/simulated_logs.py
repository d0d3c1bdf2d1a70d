"""The tables of `megatron-ads data simulate` as logs: items are advertisers, described by their ads.

Histories are those of the simulator's rows, so that the models see the same of a user in logs and in rows.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ads.data.bad_rows import BadRow, BadRowError
from megatron_ads.data.simulator.folder import MANIFEST
from megatron_ads.data.simulator.histories import SHOPPER
from megatron_ads.data.table_fields import text_of, time_of
from megatron_ads.data.table_files import Cells
from megatron_ads.data.user_features import LoggedEvent
from megatron_ads.downstream.log_tables import flag_of, read_rows, seconds_of
from megatron_ads.downstream.logs import Impression, Item, Logs, make_logs, read_team_logs
from megatron_ads.errors import DataError
from megatron_ads.tasks.user_history import Demographics, EventKind

Numbered = Mapping[Any, dict[str, Any]]
"""Rows of a table by the number that other tables know them by."""
UserEvent = tuple[str, LoggedEvent]


def read_logs(folder: Path) -> Logs:
    """Return the logs in a folder, a simulation's or a team's own.

    Raises:
        DataError: As ``read_team_logs``.
    """
    if not folder.is_dir():
        raise DataError(
            f"{folder} is not a folder of logs. Name yours, or one that `megatron-ads data simulate` wrote."
        )
    return read_simulated_logs(folder) if (folder / MANIFEST).is_file() else read_team_logs(folder)


def read_simulated_logs(folder: Path) -> Logs:
    """Return the logs of a simulation; errors as of ``read_team_logs``."""
    world = _World(
        kinds=_numbered(folder, "kind", ("name", "department")),
        advertisers=_numbered(folder, "advertiser", ("name", "domain", "kinds", "price_level", "place")),
        ads=_numbered(folder, "ad", ("advertiser", "kind", "brand", "title", "description")),
        queries=_numbered(folder, "query", ("text", "kind"), table="queries"),
    )
    events = read_rows(folder, "sessions", world.search, ("user", "time", "onsite", "query"))
    events += read_rows(folder, "conversions", world.conversion, ("user", "time", "kind", "advertiser", "attributed"))
    events += read_rows(folder, "visits", world.visit, ("user", "time", "kind", "advertiser"))
    shown = read_rows(folder, "impressions", world.impression, ("user", "time", "query", "ad", *_HAPPENED), _MORE)
    events += [click for _, click in shown if click is not None]
    about = dict(read_rows(folder, "users", _about, ("user", "age", "gender", "place", "price_level")))
    return make_logs(world.items(), events, about, [impression for impression, _ in shown])


_HAPPENED = ("clicked", "converted")
_CHANCES = ("click_chance", "conversion_chance")
_MORE = ("seconds", *_CHANCES)


def _numbered(folder: Path, number: str, columns: tuple[str, ...], *, table: str | None = None) -> Numbered:
    return {row[number]: row for row in read_rows(folder, table or f"{number}s", dict, (number, *columns))}


def _user(row: Cells) -> str:
    return f"user-{row['user']}"  # as the rows call them


def _about(row: Cells) -> tuple[str, Demographics]:
    shopper = SHOPPER.get(text_of(row, "price_level"), "shopper")
    state = f"{shopper} in {text_of(row, 'place')}"
    return _user(row), Demographics(age=text_of(row, "age"), gender=text_of(row, "gender"), state=state)


@dataclass(frozen=True, kw_only=True, slots=True)
class _World:
    """The tables that do not grow, and what makes events of the others."""

    kinds: Numbered
    advertisers: Numbered
    ads: Numbered
    queries: Numbered

    def items(self) -> list[Item]:
        """Return every advertiser; in its text what it sells, its price level and place, and the titles of its ads."""
        titles: dict[Any, list[str]] = defaultdict(list)
        for ad in self.ads.values():
            titles[ad["advertiser"]].append(ad["title"])
        return [
            Item(shop["name"], "\n".join([*self._traits(shop), *titles[number]]))
            for number, shop in sorted(self.advertisers.items())
        ]

    def _traits(self, shop: Mapping[str, Any]) -> list[str]:
        sold = [self.kinds[kind]["name"] for kind in shop["kinds"]]
        return [trait for trait in (*sold, shop["price_level"], shop["place"]) if trait]

    def search(self, row: Cells) -> UserEvent:
        query = _row(self.queries, row, "query")
        kind = EventKind.onsite_search if flag_of(row, "onsite") else EventKind.offsite_search
        category = self.kinds[query["kind"]]["name"]
        return _user(row), LoggedEvent(time=time_of(row, "time"), kind=kind, text=query["text"], category=category)

    def conversion(self, row: Cells) -> UserEvent:
        shop = _row(self.advertisers, row, "advertiser")
        sold = self.kinds[row["kind"] if row["kind"] in shop["kinds"] else shop["kinds"][0]]["name"]
        kind = EventKind.attributed_conversion if flag_of(row, "attributed") else EventKind.matched_conversion
        return _user(row), LoggedEvent(
            time=time_of(row, "time"), kind=kind, text=sold, category=sold, advertiser=shop["name"]
        )

    def visit(self, row: Cells) -> UserEvent:
        shop, sold = _row(self.advertisers, row, "advertiser"), _row(self.kinds, row, "kind")["name"]
        url = f"{shop['domain']}/{sold.replace(' ', '-')}"
        return _user(row), LoggedEvent(
            time=time_of(row, "time"), kind=EventKind.offsite_url, text=url, category=sold, advertiser=shop["name"]
        )

    def impression(self, row: Cells) -> tuple[Impression, UserEvent | None]:
        """Return what was shown, and the click on it."""
        ad, query = _row(self.ads, row, "ad"), _row(self.queries, row, "query")
        shop, user, time = self.advertisers[ad["advertiser"]], _user(row), time_of(row, "time")
        chances = tuple(float(row[name]) for name in _CHANCES if row.get(name) is not None)  # type: ignore[arg-type]
        shown = Impression(
            user=user,
            time=time,
            item=ad["advertiser"],
            query=query["text"],
            clicked=flag_of(row, "clicked"),
            converted=flag_of(row, "converted"),
            seconds=seconds_of(row),
            chances=(chances[0], chances[1]) if len(chances) == len(_CHANCES) else None,
        )
        category, text = self.kinds[ad["kind"]]["name"], ad["title"]
        click = LoggedEvent(
            time=time, kind=EventKind.click, text=text, category=category, brand=ad["brand"], advertiser=shop["name"]
        )
        return shown, (user, click) if shown.clicked else None


def _row(table: Numbered, row: Cells, name: str) -> dict[str, Any]:
    found = table.get(row[name])
    if found is None:
        raise BadRowError(BadRow.unknown_label, f"{name} is {row[name]!r:.40}, which its own table does not have.")
    return found
