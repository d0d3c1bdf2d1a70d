"""`users converse` from start to end: the same users with several assistants, and success at each turn."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ads.config.user_simulation import ConverseConfig
from megatron_ads.reporting.page import fixed
from megatron_ads.user_simulation.assistants import LanguageAssistant, RulesAssistant
from megatron_ads.user_simulation.business import open_business
from megatron_ads.user_simulation.conversations import (
    Assistant,
    ClarifyingQuestion,
    Conversation,
    Search,
    converse,
    pipeline_retriever,
)
from megatron_ads.user_simulation.players import open_player
from megatron_ads.user_simulation.reports import Pages, Table, score_of, scored
from megatron_ads.user_simulation.talking_users import TalkingUsers, Topic

BEST = "best reachable"
"""What somebody reaches who knows each user's need, loyalty and price level, asks nothing, and shows the likeliest."""
OPENING, LISTENING, ASKING = "rules: search the opening", "rules: and listen", "rules: ask first, and listen"
_ASKS = {1: Topic.shop}


def run_converse(config: ConverseConfig) -> dict[str, Any]:
    """Let users talk to every assistant and return the report, as JSON values.

    Raises:
        ConfigError: If a folder cannot be written, or no request to the model can succeed.
        DataError: If logs or pipeline cannot be used, or the model stopped answering.
    """
    out = Path(config.out)
    with open_player(config.model, out, seed=config.seed) as player:
        business = open_business(config.world, out, simulated=config.simulated)
        users = TalkingUsers(business.world, business.users, seed=config.seed)
        retriever = pipeline_retriever(business, history=config.history)
        assistants: dict[str, Assistant] = {
            OPENING: RulesAssistant(shown=config.shown, asks={}, listens=False),
            LISTENING: RulesAssistant(shown=config.shown, asks={}),
            ASKING: RulesAssistant(shown=config.shown, asks=_ASKS),
        }
        if player is not None:
            assistants[str(config.model.model)] = LanguageAssistant(player, business.past.items, config)
        talks = {
            name: converse(assistant, users, retriever, config.simulated, config, name=name)
            for name, assistant in assistants.items()
        }
        lines = {name: _line(own, talks[OPENING], config) for name, own in talks.items()}
        lines[BEST] = _best(users, config)
        return {
            "users": config.simulated, "turns": config.turns, "shown": config.shown, "history": config.history,
            "assistants": lines, "usage": player.usage() if player is not None else None,
        }  # fmt: skip


def _line(talks: Sequence[Conversation], without: Sequence[Conversation], config: ConverseConfig) -> dict[str, Any]:
    """Return the scores of an assistant; ``without`` are the same users' conversations with one that never listens."""
    searches = [sum(isinstance(step, Search) for step in one.steps) for one in talks]
    questions = [sum(isinstance(step, ClarifyingQuestion) for step in one.steps) for one in talks]
    return {
        "success": [
            score_of([float(one.success is not None and one.success <= turn) for one in talks])
            for turn in range(1, config.turns + 1)
        ],
        "change": score_of(
            [
                float(one.success is not None) - float(other.success is not None)
                for one, other in zip(talks, without, strict=True)
            ]
        ),
        "searches": float(np.mean(searches)),
        "questions": float(np.mean(questions)),
        "failures": dict(Counter(one.breakdown for one in talks if one.breakdown is not None).most_common()),
    }


def _best(users: TalkingUsers, config: ConverseConfig) -> dict[str, Any]:
    """Return the expected success, in closed form: the sum of the highest p(a | need)."""
    highest = -np.sort(-users.chance_UA, axis=1)
    return {
        "success": [
            score_of(highest[:, : turn * config.shown].sum(axis=1).tolist()) for turn in range(1, config.turns + 1)
        ],
        "change": None, "searches": None, "questions": None, "failures": {},
    }  # fmt: skip


_FAILED = "Conversations that an assistant ended by what cannot be carried out"


def converse_pages(report: Mapping[str, Any]) -> Pages:
    """Return what people read of a report."""
    lines = report["assistants"]
    turns = [f"success@{turn}" for turn in range(1, report["turns"] + 1)]
    failed = [[name, why, f"{count:,}"] for name, line in lines.items() for why, count in line["failures"].items()]
    tables = [
        Table(
            "Success at each turn",
            ["assistant", *turns, "change", "searches", "questions"],
            [[name, *_cells(line)] for name, line in lines.items()],
        )
    ]
    if failed:
        tables.append(Table(_FAILED, ["assistant", "why", "count"], failed))
    knows = "the user's history and what is said" if report["history"] else "what is said in the conversation alone"
    return Pages(
        title="Conversations with simulated users",
        lead=f"{report['users']} users, who follow fixed rules; at most {report['turns']} turns, of which a question "
        f"takes one, and {report['shown']} advertisers a recommendation; the retriever has {knows}.",
        tables=tables,
        notes=[
            "success@t: conversations in which the user was shown the advertiser that it will buy from by turn t. "
            f"Change: at the last turn, against {OPENING!r}, paired by user. Brackets hold bootstrap 95 % intervals "
            "over users. Explanations are not judged.",
            f"{BEST}: expected, in closed form, for who knows every user's need, loyalty and price level.",
        ],
    )


def _cells(line: Mapping[str, Any]) -> list[str]:
    change = fixed(None) if line["change"] is None else scored(line["change"])
    return [*map(scored, line["success"]), change, fixed(line["searches"], 1), fixed(line["questions"], 1)]
