"""What a model's answers are worth as features of a conversion model, on the simulator, on a CPU.

    python -m benchmarks.features_small --out DIR [--answers best noisy random model] [--users 20000] [--seeds 3]

Logs are simulated and a pipeline is trained on them; rows about its users at its anchors are answered; features are
made of the answers; rankers are trained with and without them, and judged on users held out. Who answers:

    best     a stand-in that knows how the simulator draws, as far as a history can tell: the most that features can do
    noisy    the same, with half of the names replaced
    random   names drawn evenly: features must change nothing
    model    a small model: random weights, the language of the prompts, then fine-tuned with the recipe `sft/small` on
             users set apart, of whom neither rankers nor tables know anything; names by constrained beams

Each stage is done once; the same command continues where it was interrupted. DIR/results.md has the tables,
DIR/results.json their numbers, DIR/scores-NAME.json all that `downstream evaluate --features` measures.
"""

import argparse
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

from benchmarks.features_small_answers import answer, recall, stand_in
from benchmarks.features_small_table import tables
from benchmarks.sft_small import run_path, write_results
from megatron_ads.cli import exit_status
from megatron_ads.observability.provenance import own_code_digest
from megatron_ads.quickstart.job_stages import command_stage, train_stage
from megatron_ads.quickstart.stages import Stage, StageRecord

STAND_INS = ("best", "noisy", "random")
MODEL = "model"


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not complete yet, and write and print the tables."""
    return exit_status("benchmarks.features_small", partial(_run, parse(argv)))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for everything it writes")
    parser.add_argument("--answers", nargs="+", choices=[*STAND_INS, MODEL], default=[*STAND_INS, MODEL])
    parser.add_argument("--users", type=int, default=20_000, metavar="N", help="people in the logs (default 20000)")
    parser.add_argument("--apart", type=float, default=0.3, help="share to fine-tune on (default 0.3)")
    entries = "events of a kind in a prompt (default 3)"
    parser.add_argument("--history-entries", type=int, default=3, metavar="N", help=entries)
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="rankers of a line (default 3)")
    parser.add_argument("--ranks", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: 2)")
    parser.add_argument("--text-steps", type=int, default=400, help="on the texts (default 400)")
    parser.add_argument("--sft-steps", type=int, default=1200, help="steps of the fine-tuning (default 1200)")
    return parser.parse_args(argv)


def _run(arguments: argparse.Namespace) -> int:
    out = arguments.out.resolve()
    path = FeaturePath(out, arguments)
    records = run_path(list(path.stages()), out)
    results = {name: path.results(name, records) for name in arguments.answers}
    sizes = {name: value for name, value in vars(arguments).items() if name != "out"}
    write_results(out, {**sizes, "answers_by": results}, tables(results))
    return 0


@dataclass(frozen=True, slots=True)
class FeaturePath:
    """From simulated logs to tables."""

    out: Path
    arguments: argparse.Namespace

    def stages(self) -> Iterator[Stage]:
        """Yield the stages."""
        simulated = ["data", "simulate", "--out", str(self.out / "simulated"), "--users", str(self.arguments.users)]
        yield self._command("simulated", "simulate logs", [*simulated, "--rows", "0"], "simulated")
        train = ["downstream", "train", "--logs", str(self.out / "simulated"), "--out", str(self.out / "pipeline")]
        train += ["held_out=0.5"]  # conversions are few: half of the users make intervals narrow
        yield self._command("pipeline", "train a pipeline", train, "pipeline", after=["simulated"])
        rows = [*self._downstream("rows"), "--out", str(self.out / "rows.jsonl")]
        rows += [f"history.max_entries={self.arguments.history_entries}"]
        rows += ["--labelled", str(self.out / "train.jsonl"), "--apart", str(self.arguments.apart)]
        yield self._command("rows", "write rows", rows, "rows.jsonl", "train.jsonl", after=["pipeline"])
        for name in self.arguments.answers:
            yield from self._model() if name == MODEL else [self._stand_in(name)]
            yield from self._measured(name)

    def _downstream(self, command: str) -> list[str]:
        return ["downstream", command, "--pipeline", str(self.out / "pipeline"), "--logs", str(self.out / "simulated")]

    def _command(
        self, name: str, title: str, command: Sequence[str], *outputs: str, after: Sequence[str] = ()
    ) -> Stage:
        return command_stage(name, title, command, self.out, outputs, after=after)

    def _stand_in(self, name: str) -> Stage:
        answers = self.out / f"answers-{name}.jsonl"
        return Stage(
            name=f"answers-{name}", title=f"answer as {name}", settings={"code": own_code_digest()}, after=["rows"],
            outputs=[answers], run=partial(stand_in, self.out / "rows.jsonl", answers, self.out / "simulated", name),
        )  # fmt: skip

    def _model(self) -> Iterator[Stage]:
        from benchmarks.sft_small import write_texts

        model, texts, train = self.out / "shallow", self.out / "texts.jsonl", self.out / "train.jsonl"
        make = ["demo-model", str(model), "--preset", "shallow", "--dtype", "fp32"]
        yield self._command("shallow", "make a random checkpoint", make, "shallow")
        section = ["data=jsonl", "data.validation_rows=100", f"data.sources=[{{kind: jsonl, path: {train}}}]"]
        yield Stage(
            name="texts", title="write the texts to learn from", settings={"code": own_code_digest()}, after=["rows"],
            outputs=[texts], run=partial(write_texts, texts, [section]),
        )  # fmt: skip
        of_texts = ["data=jsonl", "data.validation_rows=100", f"data.sources=[{{kind: jsonl, path: {texts}}}]"]
        shared = ["data.seq_length=512", "optim.min_learning_rate=4.0e-4", "train.evaluate_every=400"]
        learn = [
            f"model.load={model}", f"log.dir={self.out / 'language'}", *of_texts, *shared, "loss.normalize=token",
            f"train.max_steps={self.arguments.text_steps}",
        ]  # fmt: skip
        ranks = self.arguments.ranks
        yield train_stage("language", "learn the language", learn, self.out, ranks, after=["shallow", "texts"])
        tune = [
            f"model.load={self.out / 'language' / 'export'}", f"log.dir={self.out / 'tuned'}", *section, *shared,
            f"train.max_steps={self.arguments.sft_steps}",
        ]  # fmt: skip
        yield train_stage("tuned", "fine-tune", tune, self.out, ranks, after=["language", "rows"])
        answers = self.out / f"answers-{MODEL}.jsonl"
        run = partial(answer, self.out / "rows.jsonl", answers, self.out / "tuned" / "export", self.out / "simulated")
        yield Stage(
            name=f"answers-{MODEL}", title="let the model answer", settings={}, after=["tuned", "rows"],
            outputs=[answers], resumable=True, run=run,
        )  # fmt: skip

    def _measured(self, name: str) -> Iterator[Stage]:
        answers, features = self.out / f"answers-{name}.jsonl", self.out / f"features-{name}.parquet"
        make = [*self._downstream("features"), "--rows", str(self.out / "rows.jsonl"), "--answers", str(answers)]
        make += ["--out", str(features)]
        yield self._command(
            f"features-{name}", f"make features of {name}", make, features.name, after=[f"answers-{name}"]
        )
        scores = self.out / f"scores-{name}.json"
        judge = [*self._downstream("evaluate"), "--features", str(features), "--seeds", str(self.arguments.seeds)]
        judge += ["--objectives"] if name == self.arguments.answers[0] else []
        yield Stage(
            name=f"scores-{name}", title=f"judge features of {name}", after=[f"features-{name}"], outputs=[scores],
            settings={"command": judge, "code": own_code_digest()},
            run=partial(self._judge, judge, answers, scores),
        )  # fmt: skip

    def _judge(self, command: Sequence[str], answers: Path, scores: Path) -> dict[str, Any]:
        from conversion.atomic_file import write_small
        from megatron_ads.cli import main as megatron_ads
        from megatron_ads.errors import DataError

        printed = StringIO()
        with redirect_stdout(printed):
            status = megatron_ads([*command, "--json"])
        if status:
            raise DataError(f"`megatron-ads {shlex.join(command)}` ended with status {status}. Run it by itself.")
        found = json.loads(printed.getvalue())
        found["recall"] = recall(answers, self.out / "rows.jsonl", self.out / "pipeline", self.out / "simulated")
        write_small(scores, json.dumps(found, indent=1) + "\n")
        return {}

    def results(self, name: str, records: Mapping[str, StageRecord]) -> dict[str, Any]:
        """Return what was measured of one who answers."""
        stages = [stage for stage in records if stage.endswith(f"-{name}")]
        stages += ["shallow", "texts", "language", "tuned"] if name == MODEL else []
        scores = json.loads((self.out / f"scores-{name}.json").read_text(encoding="utf-8"))
        return {**scores, "minutes": sum(records[stage].seconds for stage in stages) / 60}


if __name__ == "__main__":
    import sys

    sys.exit(main())
