"""Do simulated users tell good recommenders from bad ones? On the simulator, on a CPU.

    python -m benchmarks.user_simulation --out DIR [--parts browse noise converse agents model] [--users 8000]

Logs are simulated and a pipeline is trained on them; users of whom nothing was learned then browse, talk and have
agents, by `megatron-ads users`, each part beside its baselines:

    browse     scripted users and seven recommenders: Agent4Rec's five figures, and Kendall's tau with the truth
    noise      the same with other noise and patience: how much of either the order of recommenders bears
    converse   assistants by fixed rules, with users that the retriever knows and with strangers
    agents     agents by fixed rules: the next purchase among ten candidates, before and after reflection
    model      users played by a small model: random weights, fine-tuned on what scripted users of another world do
               (or by --model FOLDER, a checkpoint of yours)

Each stage is done once; the same command continues where it was interrupted. DIR/results.md has the tables,
DIR/results.json every number.
"""

import argparse
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

from benchmarks.sft_small import run_path, write_results
from benchmarks.user_simulation_table import tables
from megatron_ads.cli import exit_status
from megatron_ads.observability.provenance import own_code_digest
from megatron_ads.quickstart.job_stages import command_stage, train_stage
from megatron_ads.quickstart.stages import Stage, StageRecord

PARTS = ("browse", "noise", "converse", "agents", "model")
NOISES = {
    "no noise": ["user.noise=0"],
    "noise 0.5": ["user.noise=0.5"],
    "patience 1": ["user.patience=1"],
}
_PAGE_SIZE, _PAGES = 4, 3
"""Of a model: its prompts are long, and it reads each page anew."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not complete yet, and write and print the tables."""
    return exit_status("benchmarks.user_simulation", partial(_run, parse(argv)))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for everything it writes")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is measured (default: all)"
    )
    parser.add_argument("--users", type=int, default=8000, metavar="N", help="people in the logs (default 8000)")
    parser.add_argument("--simulated", type=int, default=1000, metavar="N", help="users that act (default 1000)")
    parser.add_argument(
        "--model", type=Path, metavar="FOLDER", help="checkpoint that plays users (default: one is made)"
    )
    parser.add_argument("--played", type=int, default=50, metavar="N", help="users that a model plays (default 50)")
    parser.add_argument("--steps", type=int, default=600, help="of teaching the model (default 600)")
    parser.add_argument("--ranks", type=int, default=1, help="processes of the fine-tuning (default 1)")
    return parser.parse_args(argv)


def _run(arguments: argparse.Namespace) -> int:
    out = arguments.out.resolve()
    path = UsersPath(out, arguments)
    results = path.results(run_path(list(path.stages()), out))
    sizes = {name: value for name, value in vars(arguments).items() if name not in ("out", "model")}
    write_results(out, {**sizes, **results}, tables(results))
    return 0


@dataclass(frozen=True, slots=True)
class UsersPath:
    """From simulated logs to tables."""

    out: Path
    arguments: argparse.Namespace

    def stages(self) -> Iterator[Stage]:
        """Yield the stages."""
        simulated = ["data", "simulate", "--out", str(self.out / "simulated"), "--users", str(self.arguments.users)]
        yield self._command("simulated", "simulate logs", [*simulated, "--days", "42", "--rows", "0"], "simulated")
        train = ["downstream", "train", "--logs", str(self.out / "simulated"), "--out", str(self.out / "pipeline")]
        yield self._command("pipeline", "train a pipeline", [*train, "held_out=0.5"], "pipeline", after=["simulated"])
        if "model" in self.arguments.parts and self.arguments.model is None:
            yield from self._model()
        for part, name, act, settings in self._runs():
            yield self._users(part, name, act, settings)

    def _runs(self) -> Iterator[tuple[str, str, str, list[str]]]:
        """Yield the part, name, subcommand and settings of every run of `users`."""
        size = [f"simulated={self.arguments.simulated}"]
        for part in self.arguments.parts:
            if part == "browse":
                yield part, "browse", "browse", size
            elif part == "noise":
                for name, settings in NOISES.items():
                    yield part, f"browse-{name.replace(' ', '-')}", "browse", [*size, *settings]
            elif part == "converse":
                for history in ("false", "true"):
                    yield part, f"converse-history-{history}", "converse", [*size, f"history={history}"]
            elif part == "agents":
                yield part, "agents", "agents", [f"simulated={self.arguments.simulated // 2}"]
            else:
                few = [f"simulated={self.arguments.played}", f"pages={_PAGES}", f"page_size={_PAGE_SIZE}", _FEW]
                yield part, "browse-same-users", "browse", few
                model = self.arguments.model or self.out / "taught" / "export"
                yield part, "browse-model", "browse", [*few, "model.kind=local", f"model.model={model}", *_SAMPLED]

    def _users(self, part: str, name: str, act: str, settings: Sequence[str]) -> Stage:
        folder = self.out / "runs" / name
        command = ["users", act, "--recipe", f"users/{act}", "--out", str(folder), *settings]
        command += [f"world.logs={self.out / 'simulated'}", f"world.pipeline={self.out / 'pipeline'}"]
        made = ["taught"] if name == "browse-model" and self.arguments.model is None else []
        return Stage(
            name=name, title=f"{part}: {name}", settings={"command": command, "code": own_code_digest()},
            after=["pipeline", *made], outputs=[folder], resumable=True, run=partial(_report, command),
        )  # fmt: skip

    def _command(
        self, name: str, title: str, command: Sequence[str], *outputs: str, after: Sequence[str] = ()
    ) -> Stage:
        return command_stage(name, title, command, self.out, outputs, after=after)

    def _model(self) -> Iterator[Stage]:
        rows, model = self.out / "taught.jsonl", self.out / "shallow"
        make = ["demo-model", str(model), "--preset", "shallow", "--dtype", "fp32"]
        yield self._command("shallow", "make a random checkpoint", make, "shallow")
        yield Stage(
            name="rows", title="write down what scripted users of another world do", outputs=[rows],
            settings={"code": own_code_digest()}, run=partial(write_rows, rows, self.out / "other"),
        )  # fmt: skip
        settings = [
            f"model.load={model}", f"log.dir={self.out / 'taught'}", "data=jsonl", "data.validation_rows=100",
            f"data.sources=[{{kind: jsonl, path: {rows}}}]", "data.seq_length=512", "train.evaluate_every=200",
            f"train.max_steps={self.arguments.steps}",
        ]  # fmt: skip
        yield train_stage(
            "taught", "fine-tune on it", settings, self.out, self.arguments.ranks, after=["shallow", "rows"]
        )

    def results(self, records: Mapping[str, StageRecord]) -> dict[str, Any]:
        """Return what every run reported, and the minutes that it took."""
        found = {}
        for _, name, _, _ in self._runs():
            report = json.loads((self.out / "runs" / name / "report.json").read_text(encoding="utf-8"))
            if name == "browse-model":
                report["played_by"] = "a model"  # its folder is a path of this machine
            found[name] = {**report, "minutes": records[name].seconds / 60}
        return {"runs": found, "teaching_minutes": records["taught"].seconds / 60 if "taught" in records else None}


_SAMPLED = ("model.max_tokens=96", "model.temperature=1", "model.top_p=1")
"""Who is taught what people may do decides as they do by drawing: the likeliest is hardly ever a click."""
_FEW = "recommenders=[random,popular,factors,two_towers]"


def _report(command: Sequence[str]) -> dict[str, Any]:
    from megatron_ads.cli import main as megatron_ads
    from megatron_ads.errors import DataError

    with redirect_stdout(StringIO()):
        status = megatron_ads(list(command))
    if status:
        raise DataError(f"`megatron-ads {shlex.join(command)}` ended with status {status}. Run it by itself.")
    return {}


def write_rows(file: Path, folder: Path, *, people: int = 1500, rows: int = 3000) -> dict[str, Any]:
    """Write pages and what scripted users do on them, as chat rows, of another world than what is measured."""
    from conversion.atomic_file import write_small
    from megatron_ads.config.user_simulation import BrowseConfig, RecommenderKind, SimulatedWorldConfig
    from megatron_ads.user_simulation.browsing import AdServer, browse
    from megatron_ads.user_simulation.business import open_business
    from megatron_ads.user_simulation.language_users import page_prompt, personas, write_page_answer
    from megatron_ads.user_simulation.recommenders import RankerSettings, best_ranking, rankings
    from megatron_ads.user_simulation.scripted_users import ScriptedUsers

    world, count = SimulatedWorldConfig(seed=1, users=people, held_out=0.5), people * 2 // 5
    config = BrowseConfig(simulated=count, pages=_PAGES, page_size=_PAGE_SIZE, world=world)
    config.user.noise = 0.0
    business = open_business(world, folder, simulated=count)
    ranked = rankings(business, [RecommenderKind.random], RankerSettings(seed=1)) | {"best": best_ranking(business)}
    server, users = AdServer(business.world, 1), ScriptedUsers(business.world, business.users, config)
    ads = {name: server.ads(business.users.names, ranking) for name, ranking in ranked.items()}
    told, lines = personas(business.world, business.users, users.need_U.tolist()), []
    for visit in browse(ads, users, pages=_PAGES, page_size=_PAGE_SIZE):
        for page in range(len(visit.answers)):
            prompt = page_prompt(told[visit.user], visit.until(page), business.world, _PAGES)
            messages = [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": write_page_answer(visit.answers[page])},
            ]
            name = f"{visit.recommender}-{visit.user}-{page}"
            lines.append(json.dumps({"id": name, "task": "browsing", "group": str(visit.user), "messages": messages}))
    write_small(file, "\n".join(lines[:rows]) + "\n")
    return {"rows": min(len(lines), rows)}


if __name__ == "__main__":
    import sys

    sys.exit(main())
