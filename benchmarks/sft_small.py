"""Fine-tune a small model on ads tasks on a CPU, and see what each ingredient of the recipe is worth.

    python -m benchmarks.sft_small --out DIR [--data simulator|real] [--variant NAME] [key=value ...]

A random checkpoint first learns to read: it is trained on the prompts of the training rows, and on the general rows, as
plain texts, because who fine-tunes starts from a model that knows the language. It sees no answer to an ads task there.
Every variant continues from it with the recipe ``sft/small`` and answers the same held-out rows: names by constrained
beam search, everything else greedily. Each stage is done once; the same command continues where it was interrupted.

DIR/results.md has the table, DIR/results.json every number, DIR/VARIANT/report.html the curves and
DIR/VARIANT/answers.html the answers. MEGATRON_ADS_DATA names the public data, which the general rows and
``--data real`` need.
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

from benchmarks.sft_small_table import table
from megatron_ads.cli import exit_status
from megatron_ads.errors import ConfigError
from megatron_ads.observability.provenance import own_code_digest, provenance
from megatron_ads.quickstart.job_stages import command_stage, train_stage
from megatron_ads.quickstart.stages import Stage, StageRecord

RECIPE = "sft/small"
TEXT_STEPS = 800
"""Steps on the texts."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to fine-tune."""

    about: str
    train: tuple[str, ...]
    """Settings that replace the recipe's."""
    evaluate: tuple[str, ...]
    """Settings that say which rows are held out, and how answers are read."""


def simulated_variants(data: str) -> dict[str, Variant]:
    """Return the recipe, and with one ingredient changed; ``data`` names the one with public rows, if there are any."""
    held_out = (f"data={data}",)
    adaptive = ("reweight.instances=true", "reweight.tasks=true", "train.evaluate_every=100")
    return {
        "recipe": Variant("the recipe", held_out, held_out),
        "adaptive": Variant("adaptive weights", (*held_out, *adaptive), held_out),
        "label_only": Variant(
            "answers alone", (*held_out, "data.reasoning=false"), (*held_out, "data.reasoning=false")
        ),
    }


# All rows held out with public rows are held out without them, too: every task then gives more.
NO_PUBLIC = Variant("no public rows", ("data=simulator",), ("data=simulator_general",))
# About two passes over the rows: 4,700 pairs, and 13,000 days of purchases.
_REAL = ("data.seq_length=512", "train.evaluate_every=200")
_ESCI = ("data=esci", *_REAL, "data.validation_rows=256", "train.max_steps=400")
_NEXT_BRAND = ("data=next_brand", *_REAL, "data.validation_rows=800", "train.max_steps=1200")
REAL = {
    "esci": Variant("query and product", _ESCI, _ESCI),
    "next_brand": Variant("next brand", _NEXT_BRAND, _NEXT_BRAND),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not complete yet, and write and print the table."""
    arguments = _parse(argv)
    return exit_status("benchmarks.sft_small", partial(_run, arguments))


def _run(arguments: argparse.Namespace) -> int:
    variants = _variants(arguments.data)
    names = arguments.variant or list(variants)
    if unknown := [name for name in names if name not in variants]:
        raise ConfigError(f"There is no variant {', '.join(unknown)}; there are {', '.join(variants)}.")
    chosen = {name: variants[name] for name in names}
    out = arguments.out.resolve()
    stages = list(_stages(out, chosen, variants, arguments))
    results = _results(chosen, run_path(stages, out))
    write_results(out, {"ranks": arguments.ranks, "variants": results}, table(results))
    return 0


def run_path(stages: Sequence[Stage], out: Path) -> dict[str, StageRecord]:
    """Run the stages that are not complete yet; SIGTERM ends them as Ctrl-C does."""
    from megatron_ads.launching.processes import termination_as_interrupt
    from megatron_ads.quickstart.stages import run_stages

    with termination_as_interrupt():
        return run_stages(stages, out, {})


def write_results(out: Path, report: Mapping[str, Any], text: str) -> None:
    """Write ``report``, with what it was measured on, and the tables ``text``, and print them."""
    from conversion.atomic_file import write_small

    write_small(out / "results.json", json.dumps({**provenance(), **report}, indent=1) + "\n")
    write_small(out / "results.md", text)
    print(f"\n{text}\n{out / 'results.json'}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for everything it writes")
    parser.add_argument("--data", choices=["simulator", "real"], default="simulator")
    parser.add_argument("--variant", action="append", metavar="NAME", help="only this; may be repeated (default: all)")
    parser.add_argument("--ranks", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: 2)")
    parser.add_argument("--text-steps", type=int, default=TEXT_STEPS, help=f"steps on the texts (default {TEXT_STEPS})")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings of every variant: train.max_steps=500"
    )
    return parser.parse_intermixed_args(argv)


def _variants(data: str) -> dict[str, Variant]:
    public = "MEGATRON_ADS_DATA" in os.environ
    if data == "real":
        if not public:
            raise ConfigError("--data real needs MEGATRON_ADS_DATA: the folder with esci_us and next_brand_office.")
        return REAL
    if not public:
        return simulated_variants("simulator")
    return {**simulated_variants("simulator_general"), "no_public": NO_PUBLIC}


def _stages(
    out: Path, chosen: Mapping[str, Variant], variants: Mapping[str, Variant], arguments: argparse.Namespace
) -> Iterator[Stage]:
    model, texts, language = out / "model", out / "texts.jsonl", out / "language"
    make = ["demo-model", str(model), "--preset", "shallow", "--dtype", "fp32"]
    yield command_stage("model", "make a random checkpoint", make, out, ["model"])
    # Settings of the data decide over what is held out, which the texts must not show.
    of_data = [setting for setting in arguments.overrides if setting.startswith("data")]
    sections = sorted(
        {(*variant.evaluate, *of_data) for variant in variants.values() if "data.reasoning=false" not in variant.train}
    )
    yield Stage(
        name="texts", title="write the texts to learn from", outputs=[texts],
        settings={"sections": sections, "code": own_code_digest()}, run=partial(write_texts, texts, sections),
    )  # fmt: skip
    learn = [
        f"model.load={model}", f"log.dir={language}", "data=jsonl", "data.seq_length=512", "data.validation_rows=200",
        f"data.sources=[{{kind: jsonl, path: {texts}}}]", "loss.normalize=token", "optim.min_learning_rate=4.0e-4",
        f"train.max_steps={arguments.text_steps}",
    ]  # fmt: skip
    yield train_stage(
        "language", "learn the language", learn, out, arguments.ranks, after=["model", "texts"], recipe=RECIPE
    )
    for name, variant in chosen.items():
        run = out / name
        settings = [f"model.load={language / 'export'}", f"log.dir={run}", *variant.train, *arguments.overrides]
        title = f"fine-tune: {variant.about}"
        yield train_stage(name, title, settings, out, arguments.ranks, after=["language"], recipe=RECIPE)
        yield Stage(
            name=f"{name}-scores",
            title="answer the held-out rows",
            settings={"data": variant.evaluate},
            after=[name],
            outputs=[run / "answers.jsonl"],
            resumable=True,
            run=partial(_evaluate, run, [*variant.evaluate, *arguments.overrides]),
        )


def write_texts(file: Path, sections: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Write the prompt of every training row of some data sections, and general rows whole, as texts to say."""
    from conversion.atomic_file import write_small
    from megatron_ads.config.recipes import load_recipe
    from megatron_ads.data.corpus import read_corpus
    from megatron_ads.tasks.registry import TASKS

    corpora = [read_corpus(load_recipe(RECIPE, section, sections=["data"]).data) for section in sections]
    rows = [row for corpus in corpora for of_source in corpus.training for row in of_source]
    lines = []
    for row in rows:
        text = "\n".join(message.content for message in (row.prompt if row.task in TASKS else row.messages))
        messages = [{"role": "user", "content": "Text:"}, {"role": "assistant", "content": text}]
        # All ask the same, by which rows are otherwise held out together.
        of_row = {"id": f"text-{row.id}", "group": row.group or row.id}
        lines.append(json.dumps({**of_row, "task": "language", "messages": messages}))
    write_small(file, "\n".join(lines) + "\n")
    return {"rows": len(rows)}


def _evaluate(run: Path, overrides: Sequence[str]) -> dict[str, Any]:
    from megatron_ads.config.generation import GenerationConfig, Method
    from megatron_ads.evaluation.evaluate import evaluate
    from megatron_ads.evaluation.request import EvaluationRequest

    request = EvaluationRequest(
        recipe=RECIPE,
        overrides=overrides,
        batch_size=64,
        answers_file=run / "answers.jsonl",
        how=GenerationConfig(method=Method.constrained_beam),
        html_file=run / "answers.html",
    )
    return evaluate(run / "export", request)


def _results(chosen: Mapping[str, Variant], records: Mapping[str, StageRecord]) -> dict[str, Any]:
    results = {}
    for name, variant in chosen.items():
        stages = [records[stage] for stage in ("model", "texts", "language", name, f"{name}-scores")]
        results[name] = {
            "about": variant.about,
            "settings": variant.train,
            "steps": records[name].result["steps"],
            "minutes": sum(record.seconds for record in stages) / 60,
            "interrupted": any(record.resumed for record in stages),
            "scores": records[f"{name}-scores"].result,
        }
    return results


if __name__ == "__main__":
    sys.exit(main())
