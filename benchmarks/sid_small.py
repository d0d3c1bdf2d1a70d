"""What semantic IDs in the prompt are worth to a small model, on a CPU: text alone against IDs, at equal steps.

    python -m benchmarks.sid_small --out DIR [--data simulator|real] [--arms text sid item] [--quantizer rqvae]

A random checkpoint learns the language of the prompts first, as in ``benchmarks.sft_small``. Then

    text   is trained on the next advertiser and general rows, and fine-tuned on the next advertiser
    sid    gets tokens for semantic IDs; phase 1 trains their rows alone, phase 2 everything on the next advertiser, the
           next item, items and general rows; then it is fine-tuned as text is, with IDs of recent items in the prompt
    item   continues from phase 2 of sid and is fine-tuned on the next item: generative retrieval

text and sid take the same number of steps, of batches of the same size, and answer the same held-out rows by beams over
the valid names; the words of their prompts are the same. General ability is the perplexity of held-out school
mathematics after each phase. ``--data simulator``: IDs are of what shops sell, with price and place, which histories do
not say. ``--data real``: office purchases, a brand standing in for an advertiser.

Each stage is done once; the same command continues where it was interrupted. DIR/results.md has the tables,
DIR/results.json every number. MEGATRON_ADS_DATA names the public data, which the general rows need.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.sft_small import run_path, write_results, write_texts
from benchmarks.sid_small_rows import IDS, ITEM, TEXT, write_training_rows
from benchmarks.sid_small_table import tables
from megatron_ads.cli import exit_status
from megatron_ads.errors import ConfigError
from megatron_ads.observability.provenance import own_code_digest
from megatron_ads.quickstart.job_stages import command_stage, train_stage
from megatron_ads.quickstart.stages import Stage, StageRecord

ARMS = ("text", "sid", "item")
_GENERAL = "general-"
"""Before the name of the stage whose general ability is measured."""
_ROWS = ("data.seq_length=512",)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not complete yet, and write and print the tables."""
    return exit_status("benchmarks.sid_small", partial(_run, parse(argv)))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for everything it writes")
    parser.add_argument("--data", choices=["simulator", "real"], default="simulator")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
    parser.add_argument("--quantizer", choices=["rqvae", "rqkmeans"], default="rqvae")
    parser.add_argument("--levels", type=int, default=3, help="of semantic IDs (default 3)")
    parser.add_argument("--codes", type=int, default=32, help="of a level (default 32)")
    parser.add_argument("--ranks", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: 2)")
    for name, steps, about in (
        ("text", 800, "on the texts"),
        ("phase1", 200, "of new tokens alone"),
        ("phase2", 800, "of everything"),
        ("task", 1200, "of fine-tuning"),
    ):
        parser.add_argument(f"--{name}-steps", type=int, default=steps, help=f"{about} (default {steps})")
    parser.add_argument(
        "--rows", type=int, default=12_000, metavar="N", help="records, and general rows (default 12000)"
    )
    parser.add_argument("--held-out", type=int, default=800, metavar="N", help="rows to answer (default 800)")
    return parser.parse_args(argv)


def _run(arguments: argparse.Namespace) -> int:
    if "MEGATRON_ADS_DATA" not in os.environ:
        raise ConfigError("benchmarks.sid_small needs MEGATRON_ADS_DATA: the folder with gsm8k and next_brand_office.")
    if "item" in arguments.arms and "sid" not in arguments.arms:
        raise ConfigError("The arm item continues from phase 2 of sid: give both, --arms sid item.")
    out = arguments.out.resolve()
    path = SidPath(out, arguments)
    records = run_path(list(path.stages()), out)
    sizes = {name: value for name, value in vars(arguments).items() if name != "out"}
    results = path.results(records)
    write_results(out, {**sizes, **results}, tables(results))
    return 0


@dataclass(frozen=True, slots=True)
class SidPath:
    """From items to tables."""

    out: Path
    arguments: argparse.Namespace

    def stages(self) -> Iterator[Stage]:
        """Yield the stages."""
        if "sid" in self.arguments.arms:
            yield from self._semantic_ids()
        yield from self._base()
        if "text" in self.arguments.arms:
            yield from self._text_arm()
        if "sid" in self.arguments.arms:
            yield from self._sid_arm()
        if "item" in self.arguments.arms:
            yield from self._tuned("item", "phase2", ITEM)

    def results(self, records: Mapping[str, StageRecord]) -> dict[str, Any]:
        """Return what was measured, by arm and by phase."""
        general = [name.removeprefix(_GENERAL) for name in records if name.startswith(_GENERAL)]
        return {
            "codebook": json.loads((self.out / "sid" / "report.json").read_text()) if "sid" in records else None,
            "rows": records["rows"].result,
            "arms": {arm: records[f"scores-{arm}"].result for arm in self.arguments.arms},
            "general": {stage: records[_GENERAL + stage].result["general"] for stage in general},
            "minutes": {name: record.seconds / 60 for name, record in records.items()},
        }

    def _semantic_ids(self) -> Iterator[Stage]:
        items = Path(os.environ.get("MEGATRON_ADS_DATA", "")) / "next_brand_office" / "items.jsonl"
        columns, after = ["--id", "item_id", "--text", "title", "--text", "brand"], []
        if self.arguments.data == "simulator":
            simulate = ["data", "simulate", "--out", str(self.out / "simulated"), "--users", "100", "--rows", "0"]
            yield self._command("simulated", "simulate items", simulate, "simulated")
            items = self.out / "simulated" / "items.parquet"
            columns, after = ["--id", "item", "--text", "text"], ["simulated"]
        sizes = [f"{name}={getattr(self.arguments, name)}" for name in ("quantizer", "levels", "codes")]
        fit = ["sid", "fit", "--items", str(items), *columns, "--out", str(self.out / "sid"), *sizes]
        yield self._command("sid", "give items semantic IDs", [*fit, "disambiguation_codes=128"], "sid", after=after)

    def _base(self) -> Iterator[Stage]:
        with_ids = "sid" in self.arguments.arms
        views = {view: self._held_out(view) for view in ((TEXT, IDS, ITEM) if with_ids else (TEXT,))}
        yield Stage(
            name="rows", title="write the rows to train on", settings={"views": views, "code": own_code_digest()},
            outputs=[self._rows(view) for view in views], after=["sid"] if with_ids else [],
            run=partial(write_training_rows, self.out, views),
        )  # fmt: skip
        model, texts = self.out / "model", self.out / "texts.jsonl"
        make = ["demo-model", str(model), "--preset", "shallow", "--dtype", "fp32"]
        yield self._command("model", "make a random checkpoint", make, "model")
        section = self._mixed([self._source(TEXT), self._math])
        yield Stage(
            name="texts", title="write the texts to learn from", outputs=[texts], after=["rows"],
            settings={"section": section, "code": own_code_digest()}, run=partial(write_texts, texts, [section]),
        )  # fmt: skip
        learn = ["data=jsonl", *self._mixed([f"{{kind: jsonl, path: {texts}}}"]), "loss.normalize=token"]
        learn.append("optim.min_learning_rate=4.0e-4")
        steps = self.arguments.text_steps
        after = ["model", "texts"]
        yield self._train("language", "learn the language", "sft/small", model, learn, steps, after)
        yield self._general("language")

    def _text_arm(self) -> Iterator[Stage]:
        steps = self.arguments.phase1_steps + self.arguments.phase2_steps
        mixed = self._mixed([self._source(TEXT), self._math])
        yield self._train("text-mixed", "text: mixed rows", "sft/sid_mixed", "language", mixed, steps)
        yield self._general("text-mixed")
        yield from self._tuned("text", "text-mixed", TEXT)

    def _sid_arm(self) -> Iterator[Stage]:
        hf = self.out / "language-hf"
        export = ["convert", "to-hf", str(self.out / "language" / "export"), str(hf)]
        yield self._command("language-hf", "export the language", export, hf.name, after=["language"])
        grow = ["convert", "grow-vocabulary", str(hf), str(self.out / "grown"), "--sid", str(self.out / "sid")]
        yield self._command("grown", "add tokens", grow, "grown", after=["language-hf", "sid"])
        alignment = f"{{kind: jsonl, path: {self.out / 'sid' / 'alignment.jsonl'}, weight: 2}}"
        grown, steps = self.out / "grown", self.arguments.phase1_steps
        phase1 = self._mixed([alignment])
        yield self._train("phase1", "IDs: new tokens alone", "sft/sid_new_tokens", grown, phase1, steps, ["grown"])
        yield self._general("phase1")
        phase2 = self._mixed([self._source(IDS), self._source(ITEM, weight=2), alignment, self._math])
        steps = self.arguments.phase2_steps
        yield self._train("phase2", "IDs: everything", "sft/sid_mixed", "phase1", phase2, steps)
        yield self._general("phase2")
        yield from self._tuned("sid", "phase2", IDS, compared="text")

    @property
    def _math(self) -> str:
        """The source of general rows."""
        return f"{{kind: gsm8k, rows: {self.arguments.rows}, weight: 3, keep_share: true}}"

    def _rows(self, view: str) -> Path:
        return self.out / f"train-{view}.jsonl"

    def _source(self, view: str, weight: int = 3) -> str:
        return f"{{kind: jsonl, path: {self._rows(view)}, weight: {weight}}}"

    def _mixed(self, sources: Sequence[str]) -> list[str]:
        """Return the settings of rows to train on, of which a few are held out to watch the loss."""
        return [*_ROWS, f"data.sources=[{', '.join(sources)}]", "data.validation_rows=100", "data.split_by=group"]

    def _held_out(self, view: str) -> list[str]:
        """Return the settings of the records that are divided into rows to train on and rows to answer."""
        real = self.arguments.data == "real"
        kind = "next_brand" if real else "simulator, task: next_advertiser"
        source = f"kind: {kind}, rows: {self.arguments.rows}"
        variant = ", variant: next_item" if view == ITEM else ""
        history = "" if view == TEXT else f", history: {{semantic_ids: {self.out / 'sid'}}}"
        split = ["data.split_by=time"] if real else []
        rows = f"data.validation_rows={self.arguments.held_out}"
        return [*_ROWS, *split, f"data.sources=[{{{source}{variant}{history}}}]", rows]

    def _train(
        self,
        name: str,
        title: str,
        recipe: str,
        start: Path | str,
        settings: Sequence[str],
        steps: int,
        after: Sequence[str] = (),
    ) -> Stage:
        """Return the stage that trains from a folder, or from the export of another stage."""
        folder = start if isinstance(start, Path) else self.out / start / "export"
        settings = [
            f"model.load={folder}", f"log.dir={self.out / name}", f"train.max_steps={steps}",
            f"train.evaluate_every={max(steps // 2, 1)}", f"optim.warmup_steps={min(30, steps // 5)}",
            "checkpoint.save_every=100", *settings,
        ]  # fmt: skip
        before = after or [str(start)]
        return train_stage(name, title, settings, self.out, self.arguments.ranks, after=before, recipe=recipe)

    def _tuned(self, arm: str, start: str, view: str, compared: str = "") -> Iterator[Stage]:
        name, steps = f"tuned-{arm}", self.arguments.task_steps
        other = compared if compared in self.arguments.arms else ""
        rows = self._mixed([self._source(view)])
        yield self._train(name, f"{arm}: fine-tune", "sft/sid_next_advertiser", start, rows, steps)
        yield self._general(name)
        held_out = self._held_out(view)
        yield Stage(
            name=f"scores-{arm}", title=f"{arm}: answer the held-out rows", resumable=True,
            settings={"data": held_out, "against": other}, outputs=[self.out / f"answers-{arm}.jsonl"],
            after=[name, *([f"scores-{other}"] if other else [])],
            run=partial(self._evaluate, arm, held_out, other),
        )  # fmt: skip

    def _evaluate(self, arm: str, settings: Sequence[str], other: str) -> dict[str, Any]:
        from megatron_ads.config.generation import GenerationConfig, Method
        from megatron_ads.evaluation.evaluate import evaluate
        from megatron_ads.evaluation.request import EvaluationRequest

        names = self.out / "sid" / "semantic_ids.txt"
        request = EvaluationRequest(
            recipe="sft/sid_next_advertiser",
            overrides=settings,
            batch_size=64,
            answers_file=self.out / f"answers-{arm}.jsonl",
            how=GenerationConfig(method=Method.constrained_beam),
            compare_file=self.out / f"answers-{other}.jsonl" if other else None,
            names_file=names if arm == ITEM else None,
        )
        found = evaluate(self.out / f"tuned-{arm}" / "export", request)
        if arm == ITEM:
            (scores,) = found["tasks"].values()
            scores["ranking"]["names_from"] = str(names.relative_to(self.out))  # not where it lies on this machine
        return found

    def _general(self, stage: str) -> Stage:
        """Return the stage that measures the perplexity of held-out general rows after another stage."""
        file = Path(os.environ.get("MEGATRON_ADS_DATA", "")) / "gsm8k" / "test.jsonl"  # no phase trains on it
        settings = [*_ROWS, f"data.sources=[{{kind: gsm8k, path: {file}}}]", "data.validation_rows=400"]
        return Stage(
            name=_GENERAL + stage, title=f"general ability after {stage}", after=[stage], settings={"data": settings},
            outputs=[self.out / f"general-{stage}.json"], run=partial(self._perplexity, stage, settings),
        )  # fmt: skip

    def _perplexity(self, stage: str, settings: Sequence[str]) -> dict[str, Any]:
        from conversion.atomic_file import write_small
        from megatron_ads.evaluation.evaluate import evaluate
        from megatron_ads.evaluation.request import EvaluationRequest

        request = EvaluationRequest(recipe="sft/sid_next_advertiser", overrides=settings, batch_size=32)
        found = evaluate(self.out / stage / "export", request)
        write_small(self.out / f"general-{stage}.json", json.dumps(found["general"]) + "\n")
        return {"general": found["general"]}

    def _command(
        self, name: str, title: str, command: Sequence[str], *outputs: str, after: Sequence[str] = ()
    ) -> Stage:
        return command_stage(name, title, command, self.out, outputs, after=after)


if __name__ == "__main__":
    sys.exit(main())
