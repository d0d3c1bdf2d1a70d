"""The command `megatron-ads`. Only the subcommand that is asked for is imported, so that help is instant.

Exit status: 0 done, 1 a check found a difference, 2 the request could not be carried out, 130 interrupted,
141 the reader of our output went away. With MEGATRON_ADS_TRACEBACK=1, what led to a refusal is printed in front of it.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from megatron_ads import __version__
from megatron_ads.errors import MegatronAdsError, as_refusals, one_line

Subparsers = Any  # argparse names its type argparse._SubParsersAction


@dataclass(frozen=True, slots=True)
class Command:
    """One subcommand, and the module that knows the rest of it."""

    name: str
    summary: str
    module: str
    mount: str | None = None
    """Function of ``module`` that adds the parser itself; None: ``module`` has ``add_arguments`` and ``run``."""

    def add(self, subparsers: Subparsers) -> None:
        """Import the module and add its parser, which sets ``run`` to what carries the request out."""
        module = import_module(self.module)
        if self.mount is not None:
            getattr(module, self.mount)(subparsers)
            return
        description, as_written = (module.__doc__ or self.summary).strip(), argparse.RawDescriptionHelpFormatter
        parser = subparsers.add_parser(
            self.name, help=self.summary, description=description, formatter_class=as_written
        )
        module.add_arguments(parser)
        parser.set_defaults(run=module.run)


COMMANDS = (
    Command("convert", "move weights between Hugging Face and Megatron", "conversion.cli", "add_convert_commands"),
    Command("verify", "compare two checkpoints tensor by tensor", "conversion.cli", "add_verify_command"),
    Command("demo-model", "write a small random checkpoint to try things on", "megatron_ads.demo_model"),
    Command("plan", "estimate what a recipe needs before a machine is rented", "megatron_ads.planning.command"),
    Command("check", "report what would stop a job before it starts", "megatron_ads.launching.job_check"),
    Command("data", "make rows to train on and look at them", "megatron_ads.data.command"),
    Command("train", "run a recipe, on this machine or on several", "megatron_ads.launching.train"),
    Command("compare-logits", "run one model in transformers and in Megatron", "megatron_ads.parity.compare_logits"),
    Command("evaluate", "have a model answer held-out rows and score them", "megatron_ads.evaluation.command"),
    Command("regress", "compare public benchmarks before and after fine-tuning", "megatron_ads.regress.command"),
    Command("label", "have a model label rows in bulk", "megatron_ads.labelling.command"),
    Command("distill", "fine-tune a smaller model on a teacher's answers", "megatron_ads.distillation.command"),
    Command("downstream", "train and score the frozen pipeline that rewards use", "megatron_ads.downstream.command"),
    Command("users", "let simulated users try recommenders", "megatron_ads.user_simulation.command"),
    Command("sid", "give items semantic IDs: codes of their embeddings", "megatron_ads.semantic_ids.command"),
    Command("parity", "compare a checkpoint in transformers and in Megatron-Core", "megatron_ads.parity.command"),
    Command("quickstart", "run the whole path on this machine", "megatron_ads.quickstart.command"),
)


def build_parser(chosen: str | None = None) -> argparse.ArgumentParser:
    """Return the parser with every command listed and ``chosen`` complete."""
    parser = argparse.ArgumentParser(
        prog="megatron-ads", description="Fine-tune DeepSeek-style mixture-of-experts and dense models on ads tasks."
    )
    parser.add_argument("--version", action="version", version=f"megatron-ads {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        if command.name == chosen:
            command.add(subparsers)
        else:
            subparsers.add_parser(command.name, help=command.summary, add_help=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in arguments if not word.startswith("-")), None)

    def carry_out() -> int:
        args = _parse(build_parser(chosen), arguments)
        return int(args.run(args))

    return exit_status("megatron-ads", carry_out)


def exit_status(program: str, work: Callable[[], int]) -> int:
    """Carry out a command line and return its exit status; an error that a user can cause is one line."""
    try:
        with as_refusals():
            status = work()
        sys.stdout.flush()  # a reader that went away is noticed here, not when the interpreter ends
        return status
    except MegatronAdsError as error:
        if os.environ.get("MEGATRON_ADS_TRACEBACK"):
            traceback.print_exception(error)
        print(f"{program}: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The interpreter flushes stdout once more when it ends, and would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Read a command line, in which settings, ``key=value``, may come before or after an option.

    argparse takes the positional arguments before the first option that follows them, and leaves the rest.
    """
    args, left = parser.parse_known_args(arguments)
    if not left:
        return args
    if not hasattr(args, "overrides") or any(word.startswith("-") or "=" not in word for word in left):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    args.overrides = [*args.overrides, *left]
    return args


if __name__ == "__main__":
    sys.exit(main())
