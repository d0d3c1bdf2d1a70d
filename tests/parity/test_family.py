"""Every command of `megatron-ads` on every published model, in small."""

from pathlib import Path

import pytest

from parity_tests.harness.family import MEMBERS, run_every_command
from parity_tests.harness.ranks import run_ranks

ALWAYS = ("DeepSeek-R1-0528", "R1-Distill-Qwen-7B")
"""The others are slow."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ALWAYS else pytest.mark.slow) for name in MEMBERS]
)
def test_every_command_takes_every_member_or_says_in_one_line_why_not(name: str, tmp_path: Path) -> None:
    (outcomes,) = run_ranks(1, run_every_command, name, tmp_path, process_group=False, timeout=240)
    assert len(outcomes) == 13
    refused = [one for one in outcomes if one.status != 0]
    assert [one.status for one in refused] == [2] * MEMBERS[name].fp8, refused
    for one in refused:  # the only refusal, as README lists it
        assert one.command.startswith("compare-logits ")
        assert one.errors.startswith("megatron-ads: ")
        assert one.errors.count("\n") == 1
        assert "is stored in FP8" in one.errors
