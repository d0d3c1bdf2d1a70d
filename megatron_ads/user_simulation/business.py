"""The simulated business that users act in: logs that recommenders may read, and what only the simulation knows.

Users are simulated at the last anchor of the pipeline. Recommenders have the logs before it, in which nothing was
learned of these users; the simulation has their true interests, needs and loyalty, drawn once more from the seed.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from operator import itemgetter
from pathlib import Path

from megatron_ads.config.downstream import DownstreamConfig
from megatron_ads.config.user_simulation import SimulatedWorldConfig
from megatron_ads.data.simulator.folder import MANIFEST, Scale, write_simulation
from megatron_ads.data.simulator.logs import START
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
from megatron_ads.user_simulation.latent_users import LatentUsers, draw_latent_users

LOGS, PIPELINE = "logs", "pipeline"
_USER = re.compile("user-(0|[1-9][0-9]{0,17})")
_AGAIN = "Simulate again."


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
    world, anchor = _world_of(logs_folder, scale, logs), last_anchor(logs, pipeline.config)
    days = round((anchor - START.timestamp()) / SECONDS_PER_DAY)
    if not 0 < days <= scale.days:
        raise DataError(f"{logs_folder}: its manifest has {scale.days} days, and users act after {days}. {_AGAIN}")
    past = replace(
        logs,
        events={user: [event for event in log if event.time < anchor] for user, log in logs.events.items()},
        impressions=[each for each in logs.impressions if each.time < anchor],
    )
    known = _numbered([user for user, log in past.events.items() if log], scale, logs_folder)
    later = _first_bought(logs, anchor)
    apart = [user for user in known if held_out(user, pipeline.config)]
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
        users=draw_latent_users(world, scale, {name: known[name] for name in names}, days=days),
        histories=[
            compile_history(name, past.events[name], anchor=anchor, demographics=past.about.get(name)) for name in names
        ],
        next_bought=[later.get(name) for name in names],
        learned_from=[user for user in known if not held_out(user, pipeline.config)],
    )


def _world_of(folder: Path, scale: Scale, logs: Logs) -> World:
    """Return the world that the seed of some logs draws, which must have their advertisers."""
    if scale.advertisers == len(logs.items):
        world = draw_world(scale.seed, advertisers=scale.advertisers)
        if [item.name for item in logs.items] == [shop.name for shop in world.advertisers]:
            return world
    raise DataError(f"{folder}: its advertisers are not those that its manifest's seed draws. {_AGAIN}")


def _numbered(users: Iterable[str], scale: Scale, folder: Path) -> dict[str, int]:
    """Return the users with their numbers in the simulation, which rise."""
    found: dict[str, int] = {}
    for user in users:
        match = _USER.fullmatch(user)
        if match is None or int(match[1]) >= scale.users:
            raise DataError(f"{folder}: {user!r:.40} is none of the {scale.users} users of its manifest. {_AGAIN}")
        found[user] = int(match[1])
    return dict(sorted(found.items(), key=itemgetter(1)))


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
        numbers = {field.name: manifest[field.name] for field in fields(Scale)}
        if not all(type(number) is int and number >= 0 for number in numbers.values()):
            raise ValueError(f"{numbers}")
        return Scale(**numbers)
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
