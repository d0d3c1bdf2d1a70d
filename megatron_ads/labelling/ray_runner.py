"""Epochs on Ray Data: each is one record of a data set, and actors with connections of their own label them.

What is complete is on disk, under the epoch's name, so that a job that was killed begins with the others; Ray's own
checkpoints add nothing to that. The folder must be one that all nodes see.
"""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megatron_ads.config.labelling import LabelConfig
from megatron_ads.errors import ConfigError, DataError, MegatronAdsError, one_line
from megatron_ads.labelling.labeller import Labeller, open_labeller
from megatron_ads.labelling.question_store import QuestionStore


class EpochActor:
    """One actor: a labeller, and the job's folder. What goes wrong is told, so that the other epochs go on."""

    def __init__(self, settings: str) -> None:
        """Take the job's recipe as JSON."""
        merged = OmegaConf.merge(OmegaConf.structured(LabelConfig), json.loads(settings))
        config = OmegaConf.to_object(merged)
        assert isinstance(config, LabelConfig)
        self._config = config
        self._stack = ExitStack()
        self._labeller: Labeller | None = None

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """Label one epoch, and return how many rows it has, or why it failed."""
        epoch = int(record["epoch"])
        try:
            if self._labeller is None:
                self._labeller = self._stack.enter_context(open_labeller(self._config))
            store = QuestionStore(Path(self._config.out), self._config)
            return {"epoch": epoch, "rows": self._labeller.label_epoch(store, epoch), "failure": ""}
        except MegatronAdsError as error:
            return {"epoch": epoch, "rows": 0, "failure": one_line(error)}


def label_on_ray(out: Path, config: LabelConfig, epochs: Sequence[int]) -> None:
    """Label the epochs that wait.

    Raises:
        ConfigError: If Ray is not installed.
        DataError: If epochs could not be labelled; the others are kept.
    """
    try:
        import ray
        import ray.data
        from ray.exceptions import RayError
    except ImportError as error:
        raise ConfigError(
            f"runner is ray, which is not installed ({error}): pip install 'megatron-ads[ray]', or runner=local."
        ) from None
    if not epochs:
        return
    local = {"num_cpus": config.ray.workers, "_node_ip_address": "127.0.0.1", "include_dashboard": False}
    ray.init(**({"address": config.ray.address} if config.ray.address else local), log_to_driver=False)
    try:
        asked = ray.data.from_items([{"epoch": epoch} for epoch in epochs], override_num_blocks=len(epochs))
        done = asked.map(
            EpochActor,
            fn_constructor_args=(json.dumps(asdict(replace(config, out=str(out.absolute())))),),
            compute=ray.data.ActorPoolStrategy(size=min(config.ray.workers, len(epochs))),
        )
        failed = [record for record in done.take_all() if record["failure"]]
    except RayError as error:
        raise DataError(f"Ray ended the job ({one_line(error)}). Start again: finished epochs are kept.") from None
    finally:
        ray.shutdown()
    if failed:
        raise DataError(f"{len(failed)} of {len(epochs)} epochs are not labelled, the first as {failed[0]['failure']}")
