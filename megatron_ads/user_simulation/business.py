"""The simulated business that users act in: logs that recommenders may read, and what only the simulation knows.

Users are simulated at the last anchor of the pipeline. Recommenders have the logs before it, in which nothing was
learned of these users; the simulation has their true interests, needs and loyalty, drawn once more from the seed.

Letters of array shapes: U users, K kinds, A advertisers.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ads.config.downstream import DownstreamConfig
from megatron_ads.config.user_simulation import SimulatedWorldConfig
from megatron_ads.data.simulator.folder import MANIFEST, Scale, write_simulation
from megatron_ads.data.simulator.histories import LABEL_DAYS, draw_pieces
from megatron_ads.data.simulator.logs import START
from megatron_ads.data.simulator.population import Moment, next_advertiser
from megatron_ads.data.simulator.world import World, draw_world
from megatron_ads.data.user_features import SECONDS_PER_DAY, LoggedEvent, compile_history
from megatron_ads.downstream.evaluate import require_items
from megatron_ads.downstream.examples import held_out, last_anchor
from megatron_ads.downstream.logs import Logs, item_numbers
from megatron_ads.downstream.pipeline import Pipeline, train_pipeline
from megatron_ads.downstream.pipeline_folder import load_pipeline, save_pipeline
from megatron_ads.downstream.simulated_logs import read_logs
from megatron_ads.errors import DataError
from megatron_ads.metrics.ranking import same_name
from megatron_ads.tasks.user_history import CONVERSIONS, UserHistory

LOGS, PIPELINE = "logs", "pipeline"


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentUsers:
    """U users at the anchor, as they truly are; no recommender is given any of it."""

    names: Sequence[str]
    """What logs call them."""
    moment: Moment
    """With the true interests and activity."""
    place_U: NDArray[np.int64]
    chance_UA: NDArray[np.float64]
    """True probability of each advertiser to be converted with next, in closed form."""

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, kw_only=True, slots=True)
class Business:
    """What recommenders may read, and the users as they are."""

    world: World
    past: Logs
    """Up to the anchor."""
    anchor: float
    """Seconds since 1970."""
    pipeline: Pipeline
    users: LatentUsers
    histories: Sequence[UserHistory]
    """Of each user, at the anchor, from ``past``."""
    next_bought: Sequence[int | None]
    """The first advertiser that each user bought from after the anchor, to judge by alone; None: none in the logs."""
    learned_from: Sequence[str]
    """Users of the logs that recommenders may learn from: none that is simulated."""


def open_business(config: SimulatedWorldConfig, out: Path, *, simulated: int, buying: bool = False) -> Business:
    """Return the business of a recipe; what it names no folder for is made below ``out``, once.

    Args:
        config: The recipe's section.
        out: Folder of what is made.
        simulated: How many users, the first of those held out.
        buying: Only users who bought something before the anchor and after it.

    Raises:
        ConfigError: If a folder cannot be written.
        DataError: If a folder is no simulation or no pipeline, they do not belong together, or fewer users than
            ``simulated`` are held out.
    """
    logs_folder = Path(config.logs) if config.logs is not None else _own_logs(config, out)
    scale, logs = _scale_of(logs_folder), read_logs(logs_folder)
    pipeline = _pipeline(config, out, logs)
    require_items(pipeline, logs)
    world = draw_world(scale.seed, advertisers=scale.advertisers)
    if [item.name for item in logs.items] != [shop.name for shop in world.advertisers]:
        raise DataError(f"{logs_folder}: its advertisers are not those that its manifest's seed draws. Simulate again.")
    anchor = last_anchor(logs, pipeline.config)
    past = replace(
        logs,
        events={user: [event for event in log if event.time < anchor] for user, log in logs.events.items()},
        impressions=[each for each in logs.impressions if each.time < anchor],
    )
    known = sorted((user for user, log in past.events.items() if log), key=lambda user: int(user.removeprefix("user-")))
    apart = [user for user in known if held_out(user, pipeline.config)]
    later = _first_bought(logs, anchor)
    if buying:
        apart = [user for user in apart if user in later and any(map(_is_purchase, past.events[user]))]
    if len(apart) < simulated:
        raise DataError(
            f"simulated is {simulated}, and {len(apart)} users are held out with a history"
            f"{', a purchase and a later one' if buying else ''}. Simulate fewer, or give more users or a larger "
            "held_out."
        )
    names = apart[:simulated]
    return Business(
        world=world,
        past=past,
        anchor=anchor,
        pipeline=pipeline,
        users=_latent_users(world, scale, names, days=round((anchor - START.timestamp()) / SECONDS_PER_DAY)),
        histories=[
            compile_history(name, past.events[name], anchor=anchor, demographics=past.about.get(name)) for name in names
        ],
        next_bought=[later.get(name) for name in names],
        learned_from=[user for user in known if not held_out(user, pipeline.config)],
    )


def _is_purchase(event: LoggedEvent) -> bool:
    return event.kind in CONVERSIONS


def _first_bought(logs: Logs, anchor: float) -> dict[str, int]:
    """Return the number of the first advertiser that a user bought from after the anchor, by user."""
    numbers, found = item_numbers(logs.items), dict[str, int]()
    for user, log in logs.events.items():
        for event in log:
            if event.time >= anchor and _is_purchase(event):
                found.setdefault(user, numbers[same_name(event.advertiser)])
    return found


def _own_logs(config: SimulatedWorldConfig, out: Path) -> Path:
    folder, scale = out / LOGS, Scale(seed=config.seed, users=config.users, days=config.days)
    if not (folder / MANIFEST).is_file():
        write_simulation(folder, scale)
    elif (there := _scale_of(folder)) != scale:
        raise DataError(
            f"{folder} holds {there}, and {scale} is asked for. Choose another --out, or remove the folder."
        )
    return folder


def _scale_of(folder: Path) -> Scale:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return Scale(**{field.name: manifest[field.name] for field in fields(Scale)})
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder} is no simulation ({str(error)[:100]}): users are simulated where the truth is known. Name a "
            "folder of `megatron-ads data simulate`, or leave world.logs out."
        ) from None


def _pipeline(config: SimulatedWorldConfig, out: Path, logs: Logs) -> Pipeline:
    if config.pipeline is not None:
        return load_pipeline(Path(config.pipeline))
    folder, settings = out / PIPELINE, DownstreamConfig(held_out=config.held_out)
    if not folder.exists():
        save_pipeline(train_pipeline(logs, settings), folder, trained_on={"users": len(logs.events)})
    pipeline = load_pipeline(folder)
    if pipeline.config != settings:
        raise DataError(
            f"{folder} is another pipeline than the one asked for (held_out {pipeline.config.held_out}, not "
            f"{config.held_out}). Choose another --out, or remove the folder."
        )
    return pipeline


def _latent_users(world: World, scale: Scale, names: Sequence[str], *, days: int) -> LatentUsers:
    """Draw the users once more, up to the anchor: what happens later is not drawn."""
    wanted = np.array([int(name.removeprefix("user-")) for name in names])
    parts: list[Moment] = []
    places: list[NDArray[np.int64]] = []
    for piece in draw_pieces(world, users=scale.users, days=days, anchor=days - 1):
        assert piece.true is not None, "the anchor is one of the days"
        first, count = piece.people.first_user, len(piece.people.age_U)
        rows = wanted[(wanted >= first) & (wanted < first + count)] - first
        parts.append(_rows(piece.true, rows))
        places.append(piece.people.place_U[rows])
    moment = _joined(parts)
    return LatentUsers(
        names=names,
        moment=moment,
        place_U=np.concatenate(places),
        chance_UA=next_advertiser(moment, world, window_days=LABEL_DAYS),
    )


def _rows(moment: Moment, rows: NDArray[np.int64]) -> Moment:
    values = {field.name: getattr(moment, field.name) for field in fields(moment)}
    chosen: dict[str, Any] = {name: value[rows] for name, value in values.items() if isinstance(value, np.ndarray)}
    return replace(moment, **chosen)


def _joined(parts: Sequence[Moment]) -> Moment:
    arrays = [field.name for field in fields(Moment) if isinstance(getattr(parts[0], field.name), np.ndarray)]
    joined: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in arrays}
    return replace(parts[0], **joined)
