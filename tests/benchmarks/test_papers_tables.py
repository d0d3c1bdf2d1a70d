"""The commands that the measurements have for the papers' tables are accepted, with the data they name."""

import shlex
from pathlib import Path

from megatron_ads.cli import build_parser
from megatron_ads.config.recipes import load_job

README = Path(__file__).parents[2] / "benchmarks" / "README.md"


def test_each_command_parses_and_its_rows_are_a_recipe() -> None:
    lines = README.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("megatron-ads evaluate ")]
    assert len(commands) == 7
    for command in commands:
        args = build_parser("evaluate").parse_args(command)
        data = load_job(args.recipe, args.overrides, sections=["data"]).data
        assert data.sources
        assert data.validation_rows > 0
        for number, source in enumerate(data.sources):
            source.check(f"data.sources[{number}]")
