"""A codebook in a folder: ``codebook.safetensors``, ``codebook.json`` and the tokens that a vocabulary needs for it.

Its version is a digest of settings, words and weights: tables of semantic IDs name the version they are of. Nothing in
the folder is run when it is read.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from conversion.atomic_file import write_small
from megatron_ads.config.semantic_ids import Quantizer, SemanticIdConfig, load_semantic_ids
from megatron_ads.errors import ConfigError, DataError
from megatron_ads.metrics.text import TextEmbedding, word_counter
from megatron_ads.semantic_ids.codebook import Codebook
from megatron_ads.semantic_ids.rqvae import RqVae
from megatron_ads.tasks.semantic_id import all_tokens

WEIGHTS, RECORD, TOKENS = "codebook.safetensors", "codebook.json", "tokens.txt"
_FORMAT = 1
_MODEL, _LEVEL = "rqvae.", "level."


def save_codebook(codebook: Codebook, folder: Path) -> str:
    """Write a codebook into a folder that exists; return its version."""
    weights = save({name: tensor.contiguous() for name, tensor in _tensors(codebook).items()})
    content = {
        "format": _FORMAT,
        "settings": asdict(codebook.config),
        "dimensions": len(codebook.mean_D),
        "scale": codebook.scale,
        "given_vectors": codebook.given_vectors,
        "words": None if codebook.text is None else list(codebook.text.counter.vocabulary),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    version = _version(content)
    write_small(folder / WEIGHTS, weights)
    write_small(folder / TOKENS, "".join(f"{token}\n" for token in tokens_of(codebook.config)))
    write_small(folder / RECORD, json.dumps({"version": version, **content}, indent=1, ensure_ascii=False) + "\n")
    return version


def load_codebook(folder: Path) -> tuple[Codebook, str]:
    """Return the codebook in a folder, and its version.

    Raises:
        DataError: If there is none, it is of another format, or a file is damaged.
    """
    if not (folder / RECORD).is_file() or not (folder / WEIGHTS).is_file():
        raise DataError(
            f"{folder} holds no codebook: it has no {RECORD} or no {WEIGHTS}. Fit one: megatron-ads sid fit."
        )
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        weights = (folder / WEIGHTS).read_bytes()
        content = {name: value for name, value in record.items() if name != "version"}
        if content["format"] != _FORMAT:
            raise DataError(f"{folder} has format {content['format']!r}; {_FORMAT} is read. Fit it again.")
        if record["version"] != _version(content) or content["weights_sha256"] != hashlib.sha256(weights).hexdigest():
            raise ValueError("its version is another")
        return _codebook(content, load(weights), str(folder / RECORD)), record["version"]
    except (DataError, ConfigError):
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError, SafetensorError) as error:
        raise DataError(f"{folder} is damaged ({str(error)[:200]}). Copy it again, or fit it again.") from None


def tokens_of(config: SemanticIdConfig) -> list[str]:
    """Return every token that a semantic ID of a codebook can have."""
    return list(all_tokens(config.levels, config.codes, config.disambiguation_codes))


def _version(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _tensors(codebook: Codebook) -> dict[str, Tensor]:
    found = {"mean": codebook.mean_D}
    if isinstance(codebook.quantizer, RqVae):
        found |= {_MODEL + name: tensor for name, tensor in codebook.quantizer.state_dict().items()}
    else:
        found |= {f"{_LEVEL}{level}": codes for level, codes in enumerate(codebook.quantizer)}
    if codebook.text is not None:
        found |= {
            "text.weights": torch.from_numpy(codebook.text.weights_W),
            "text.axes": torch.from_numpy(np.ascontiguousarray(codebook.text.axes_WD)),
        }
    return found


def _codebook(content: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> Codebook:
    config = load_semantic_ids(content["settings"], source)
    quantizer: RqVae | tuple[Tensor, ...]
    if config.quantizer is Quantizer.rqvae:
        with torch.device("meta"):  # nothing is allocated for sizes that the weights do not have
            quantizer = RqVae(content["dimensions"], config)
        own = {name.removeprefix(_MODEL): tensor for name, tensor in tensors.items() if name.startswith(_MODEL)}
        quantizer.load_state_dict(own, assign=True)
        quantizer.eval().requires_grad_(False)
    else:
        quantizer = tuple(tensors[f"{_LEVEL}{level}"] for level in range(config.levels))
    text = None
    if content["words"] is not None:
        weights_W, axes_WD = tensors["text.weights"].numpy(), tensors["text.axes"].numpy()
        text = TextEmbedding(word_counter(content["words"]), weights_W, axes_WD)
    return Codebook(
        config=config,
        text=text,
        given_vectors=content["given_vectors"],
        mean_D=tensors["mean"],
        scale=content["scale"],
        quantizer=quantizer,
    )
