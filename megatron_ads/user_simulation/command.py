"""`megatron-ads users`: simulated users that browse, learn and talk, to try recommenders on before real people.

    megatron-ads users browse --recipe users/browse --out runs/browse
    megatron-ads users browse --recipe users/browse --out runs/browse simulated=100 \\
      model.url=http://localhost:8000/v1 model.model=NAME
    megatron-ads users agents --recipe users/agents --out runs/agents
    megatron-ads users converse --recipe users/converse --out runs/converse

Users are of the simulated ads business, whose truth is known. Without a model, fixed rules play every part, and the
report says so; with model.model=NAME a language model does, behind any OpenAI-compatible server or, with
model.kind=local model.model=FOLDER, a checkpoint in this process. Its answers are on disk as they come: the same
command continues an interrupted simulation, and asks nothing twice. Ctrl-C and SIGTERM end it within seconds.

Exit status: 0 done, 2 the request could not be carried out, 130 interrupted."""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_ads.user_simulation.reports import Pages

Subparsers = Any  # argparse names its type argparse._SubParsersAction

_BROWSE = """Show users pages of ads of several recommenders, and measure what they do (Agent4Rec).

    megatron-ads users browse --recipe users/browse --out runs/browse
    megatron-ads users browse --recipe users/browse --out runs/browse world.logs=simulated \\
      world.pipeline=runs/downstream simulated=200 'recommenders=[random,popular,two_towers]'
    megatron-ads users browse --recipe users/browse --out runs/browse 'recommenders=[popular,two_towers,answers]' \\
      world.logs=simulated world.pipeline=runs/downstream answers.rows=rows.jsonl answers.file=answers.jsonl
    megatron-ads users browse --recipe users/browse --out runs/browse simulated=100 model.kind=local model.model=EXPORT

View ratio, clicks, click ratio, exit page and satisfaction of each recommender, with bootstrap intervals over users;
Kendall's tau between each figure and what is true of the recommenders, which is computed without simulating. The
recommender "answers" is a language model's answers to rows of `megatron-ads downstream rows`.
Settings: megatron_ads/config/user_simulation.py."""


_AGENTS = """Let agents of users and advertisers learn from purchases by reflection, and rank the next one (AgentCF).

    megatron-ads users agents --recipe users/agents --out runs/agents
    megatron-ads users agents --recipe users/agents --out runs/agents simulated=50 purchases=6
    megatron-ads users agents --recipe users/agents --out runs/agents simulated=50 \\
      model.url=http://localhost:8000/v1 model.model=NAME

A user's agent chooses between the advertiser that the user bought from and another one; if it is wrong, the memories
of the user and of both advertisers are updated. NDCG of the next purchase among candidates, before any lesson and after
all, beside recommenders on the same candidates. Without a model, memories count traits: rules, not language.
Settings: megatron_ads/config/user_simulation.py."""

_CONVERSE = """Let users talk to an assistant that searches, asks back, recommends and explains (Chat-Rec).

    megatron-ads users converse --recipe users/converse --out runs/converse
    megatron-ads users converse --recipe users/converse --out runs/converse history=true turns=8
    megatron-ads users converse --recipe users/converse --out runs/converse simulated=100 \\
      model.url=http://localhost:8000/v1 model.model=NAME

Success at each turn: was the user shown the advertiser that it will buy from? Of assistants by fixed rules, with and
without questions, of the model where one is named, and in closed form of who knows all about the user. A model calls
the retriever of the frozen pipeline; it can neither call anything else nor show what was not found.
Settings: megatron_ads/config/user_simulation.py."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommands."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add(commands, "browse", "pages of ads of several recommenders", _BROWSE)
    _add(commands, "agents", "agents with memories that reflect on their mistakes", _AGENTS)
    _add(commands, "converse", "recommendation in a conversation of several turns", _CONVERSE)


def run(args: argparse.Namespace) -> int:
    """Carry out the subcommand that was chosen."""
    from megatron_ads.config import user_simulation as config
    from megatron_ads.observability.log import start_logging

    start_logging()
    simulation = _simulations()[args.simulation]
    recipe = config.load_users_recipe(config.SIMULATIONS[args.simulation], args.recipe, args.overrides, out=args.out)
    out = Path(recipe.out)
    out.mkdir(parents=True, exist_ok=True)

    from megatron_ads.labelling.interruption import ending_soon
    from megatron_ads.user_simulation.reports import as_text, write

    with ending_soon():
        report = simulation.run(recipe)

    pages = simulation.pages(report)
    write(out, report, pages, config.users_recipe_yaml(recipe))
    print(json.dumps(report) if args.json else f"{as_text(pages)}\n{out}/report.html")
    return 0


@dataclass(frozen=True, slots=True)
class _Simulation:
    """What one subcommand does."""

    run: Callable[[Any], dict[str, Any]]
    pages: "Callable[[Any], Pages]"


def _simulations() -> dict[str, _Simulation]:
    # They import numpy and torch, without which --help is instant.
    from megatron_ads.user_simulation import agents_run, browse_run, converse_run

    return {
        "browse": _Simulation(browse_run.run_browse, browse_run.browse_pages),
        "agents": _Simulation(agents_run.run_agents, agents_run.agents_pages),
        "converse": _Simulation(converse_run.run_converse, converse_run.converse_pages),
    }


def _add(commands: Subparsers, name: str, summary: str, description: str) -> None:
    parser = commands.add_parser(
        name, help=summary, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--recipe", required=True, metavar="R", help=f"a shipped recipe, such as users/{name}, or a file"
    )
    parser.add_argument("--out", metavar="DIR", help="folder of everything it writes (default: the recipe's out)")
    parser.add_argument("--json", action="store_true", help="print the report as one line of JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's")
    parser.set_defaults(simulation=name)
