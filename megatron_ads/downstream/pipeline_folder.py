"""A pipeline in a folder: ``model.safetensors`` and ``pipeline.json``, which appear together and vouch for each other.

The digest names the content: settings, items, counts, range and weights. Nothing in the folder is run when it is read.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from conversion.atomic_file import write_small
from megatron_ads.config.downstream import load_downstream
from megatron_ads.data.new_folder import new_folder
from megatron_ads.downstream.logs import Item
from megatron_ads.downstream.pipeline import ItemCounts, Pipeline
from megatron_ads.downstream.ranker import Ranker
from megatron_ads.downstream.retriever import Retriever
from megatron_ads.errors import DataError

WEIGHTS, RECORD = "model.safetensors", "pipeline.json"
_VERSION = 1
_PARTS = ("retriever", "ranker")


def save_pipeline(pipeline: Pipeline, out: Path, *, trained_on: Mapping[str, Any]) -> str:
    """Write a pipeline into a new folder, whole or not at all; return its digest.

    Args:
        pipeline: What is written.
        out: Absent, or empty.
        trained_on: What else the record says; not part of the digest.

    Raises:
        ConfigError: If the folder holds something.
    """
    tensors = {
        f"{part}.{name}": tensor.contiguous()
        for part in _PARTS
        for name, tensor in getattr(pipeline, part).state_dict().items()
    }
    weights = save(tensors)
    content = {
        "version": _VERSION,
        "settings": asdict(pipeline.config),
        "items": [asdict(item) for item in pipeline.items],
        "counts": asdict(pipeline.counts),
        "ctcvr_range": list(pipeline.ctcvr_range),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    record = {"digest": _digest(content), **content, "trained_on": trained_on}
    with new_folder(out) as folder:
        write_small(folder / WEIGHTS, weights)
        write_small(folder / RECORD, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return str(record["digest"])


def load_pipeline(folder: Path) -> Pipeline:
    """Return the pipeline in a folder.

    Raises:
        DataError: If there is none, it is of another version, or a file is damaged.
    """
    if not (folder / RECORD).is_file() or not (folder / WEIGHTS).is_file():
        raise DataError(
            f"{folder} is no downstream pipeline: it has no {RECORD} or no {WEIGHTS}. Train one with "
            "`megatron-ads downstream train`."
        )
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        weights = (folder / WEIGHTS).read_bytes()
        content = {name: value for name, value in record.items() if name not in ("digest", "trained_on")}
        if content["version"] != _VERSION:
            raise DataError(f"{folder} has version {content['version']!r}; {_VERSION} is read. Train it again.")
        if record["digest"] != _digest(content) or content["weights_sha256"] != hashlib.sha256(weights).hexdigest():
            raise ValueError("its digest is another")
        return _pipeline(record, weights, folder)
    except DataError:
        raise
    except _DAMAGE as error:
        raise DataError(f"{folder} is damaged ({str(error)[:200]}). Copy it again, or train it again.") from None


_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError, SafetensorError)
"""What reading a damaged folder can raise; DataError is a ValueError."""


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _pipeline(record: Mapping[str, Any], weights: bytes, folder: Path) -> Pipeline:
    config = load_downstream(record["settings"], str(folder / RECORD))
    with torch.device("meta"):  # nothing is allocated for sizes that the weights do not have
        retriever = Retriever(config.retriever, config.buckets)
        ranker = Ranker(config.ranker, config.retriever.dimensions)
    tensors = load(weights)
    for part, model in zip(_PARTS, (retriever, ranker), strict=True):
        prefix = f"{part}."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        model.load_state_dict(own, assign=True)
        model.eval().requires_grad_(False)
    low, high = map(float, record["ctcvr_range"])
    return Pipeline(
        config=config,
        items=[Item(name=item["name"], text=item["text"]) for item in record["items"]],
        retriever=retriever,
        ranker=ranker,
        counts=ItemCounts(**{field.name: tuple(record["counts"][field.name]) for field in fields(ItemCounts)}),
        ctcvr_range=(low, high),
        digest=record["digest"],
    )
