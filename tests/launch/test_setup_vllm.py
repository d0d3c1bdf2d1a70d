"""launch/setup_vllm.sh: what it does not take for its own, it leaves alone."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "launch" / "setup_vllm.sh"


def test_an_environment_that_it_did_not_make_is_not_replaced(tmp_path: Path) -> None:
    theirs = tmp_path / "vllm" / "bin" / "vllm"
    theirs.parent.mkdir(parents=True)
    theirs.touch()
    given = {"MEGATRON_ADS_VLLM": str(tmp_path / "vllm"), "MEGATRON_ADS_PYTHON": sys.executable}
    done = subprocess.run(
        [str(SCRIPT)], env=os.environ | given, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, theirs.exists()) == (2, True)
    assert f"{tmp_path / 'vllm'} was not made by this script" in done.stderr
