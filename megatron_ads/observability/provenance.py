"""Where a number came from: the machine, the versions and the revision of the code, written next to every result."""

import hashlib
import os
import platform
import subprocess
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("megatron-ads", "megatron-core", "torch", "transformers", "transformer-engine", "safetensors", "numpy")


def provenance() -> dict[str, Any]:
    """Return host, accelerators, versions and git revision as JSON values; what is not there is None."""
    import torch  # seconds of import, and only this needs it

    return {
        "host": {
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)),  # which a container can make fewer than the machine has
            "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            "system": f"{platform.system()} {platform.machine()}",
            "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        },
        "versions": {"python": platform.python_version(), **package_versions()},
        "revision": git_revision(Path(__file__).parent),
    }


def _cpu_model() -> str:
    """Return the processor's name as the kernel tells it, or the architecture."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def package_versions() -> dict[str, str | None]:
    """Return the installed version of every package that can move a number; None where not installed."""
    versions: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def code_digest(*folders: Path) -> str:
    """Return a digest of every Python file and recipe below ``folders``: it changes when the code does, git or not."""
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(path for pattern in ("*.py", "*.yaml") for path in folder.rglob(pattern)):
            digest.update(f"{file.relative_to(folder)}\0{file.stat().st_size}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def own_code_digest() -> str:
    """Return the digest of everything of ours that a command runs: both packages and the shipped recipes."""
    import conversion
    from megatron_ads.config.recipes import recipes_folder

    return code_digest(Path(__file__).parent.parent, Path(conversion.__file__).parent, recipes_folder())


@cache
def git_revision(folder: Path) -> str | None:
    """Return the commit that ``folder`` is checked out at, ``-dirty`` behind it if tracked files differ from it.

    None outside a checkout or without git.
    """
    try:
        run = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() or None
