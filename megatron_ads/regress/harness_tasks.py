"""lm-eval's tasks for the suite: found, pointed at local files where there are any, and held to their versions."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_ads.errors import ConfigError, DataError, one_line
from megatron_ads.regress.own_tasks import settings_of
from megatron_ads.regress.suite import OF_FILES, Benchmark

LM_EVAL = "0.4.13"
"""What the versions in the suite are of."""
_SPLITS = ("train", "validation", "dev", "test", "prompt")
_BUILDERS = {".jsonl": "json", ".jsonl.gz": "json", ".json": "json", ".parquet": "parquet"}
"""What datasets reads files of each ending with."""


def require_lm_eval() -> None:
    """Refuse to begin without lm-eval, or with a version whose tasks are others.

    Raises:
        ConfigError: Saying what to install.
    """
    try:
        found = version("lm_eval")
    except PackageNotFoundError:
        found = "not installed"
    if found != LM_EVAL:
        raise ConfigError(
            f"the benchmarks need lm-eval {LM_EVAL}, whose tasks they are pinned to; here it is {found}. "
            f"pip install 'megatron-ads[regress]', or lm-eval=={LM_EVAL}."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedBenchmark:
    """A benchmark with its questions."""

    benchmark: Benchmark
    tasks: Mapping[str, Any]
    """``lm_eval.api.task.Task`` by name; several where the benchmark is a group."""


def load_benchmark(benchmark: Benchmark, data: Path | None, *, chat: bool) -> LoadedBenchmark:
    """Return a benchmark with its questions, from local files below ``data`` or else from the hub.

    Raises:
        DataError: If there are no questions: no network and no files, or files of another form.
        ConfigError: If lm-eval's task is of another version.
    """
    files = local_files(data / benchmark.folder) if data else {}
    taken = OF_FILES.get(benchmark.name, benchmark) if files else benchmark
    changed: dict[str, Any] = {"num_fewshot": taken.shots}
    if files:
        named = {split: str(file) for split, file in files.items()}
        builder = _BUILDERS["".join(files["test"].suffixes)] if "test" in files else "json"
        changed |= {"dataset_path": builder, "dataset_name": None, "dataset_kwargs": {"data_files": named}}
    tasks = _load(taken, changed, chat=chat)
    for name, task in tasks.items():
        if float(task.VERSION) != taken.version:
            raise ConfigError(
                f"lm-eval's task {name} has version {task.VERSION}, and the suite is pinned to {taken.version}: their "
                "scores cannot be compared. Install the pinned lm-eval."
            )
    return LoadedBenchmark(benchmark=taken, tasks=tasks)


def local_files(folder: Path) -> dict[str, Path]:
    """Return the files of a folder by split, as their names say; a single file of another name is the test split."""
    if not folder.is_dir():
        return {}
    files = [file for file in sorted(folder.iterdir()) if "".join(file.suffixes) in _BUILDERS]
    found = {file.name.split(".")[0]: file for file in files if file.name.split(".")[0] in _SPLITS}
    return found or ({"test": files[0]} if len(files) == 1 else {})


def _load(benchmark: Benchmark, changed: Mapping[str, Any], *, chat: bool) -> dict[str, Any]:
    from lm_eval import tasks as of_harness  # seconds of import

    _be_quiet()
    where = [] if benchmark.described_in is None else [Path(of_harness.__file__).parent / benchmark.described_in]
    manager = of_harness.TaskManager(include_defaults=False, include_path=where)  # all of them take 10 s to index
    if benchmark.described_in is None:
        asked: dict[str, Any] = settings_of(benchmark.task, chat=chat) | dict(changed)
    else:
        kind = "group" if benchmark.task in manager.all_groups else "task"
        # A group of our own, because settings replace those of a known task only inside of one.
        asked = {"group": "regress", "task": [{kind: benchmark.task, **changed}]}
    try:
        return dict(manager.load([asked])["tasks"])
    except (OSError, ValueError, LookupError) as error:
        raise DataError(
            f"the questions of {benchmark.name} cannot be read ({one_line(error)}). Without a network, put them into "
            f"DIR/{benchmark.folder}/test.jsonl, in the form they have on the hub, and give --data DIR; or leave the "
            "benchmark out (--benchmark)."
        ) from None


def _be_quiet() -> None:
    """Let only errors of lm-eval and datasets reach the terminal: it has our progress bar."""
    import datasets
    from lm_eval.api import task
    from tqdm import tqdm

    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    task.tqdm = partial(tqdm, disable=True)  # its bar of prompts has no name and no switch (0.4.13)
