"""Plan a Hugging Face folder with more tokens: new rows in embedding and output layer, every other byte as it was.

    new row of token t = mean of the old tokens' rows + noise * (their standard deviation, column by column) * N(0, 1)

The normal numbers are decided by the seed, the parameter and t. Rows that only fill the vocabulary up to a multiple are
the mean. Tokens of a tokenizer smaller than the model's vocabulary take rows that exist already. Source of the mean:
Hewitt, "Initializing new word embeddings for pretrained language models", 2021; the noise, which tells new tokens
apart before they are trained, is ours.

``config.json`` says which tokens are new: ``added_token_ids: [first, one behind the last]``.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from conversion.atomic_file import FileRecord, write_small
from conversion.carried import copy_side_files, find_side_files
from conversion.errors import DamagedCheckpointError, read_object
from conversion.hf_folder import INDEX, HfFolder, write_index
from conversion.names import TOKEN_TABLES, parameters
from conversion.plan import ConversionPlan, Copied, Item, NewRows, OutputFile, folder_state
from conversion.safetensors_file import HeaderEntry, SafetensorsHeader, StoredTensor, build_header, read_header
from conversion.sources import WeightSource
from megatron_ads.errors import ConfigError, ConversionError, require, require_at_least

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
ADDED_TOKEN_IDS = "added_token_ids"
"""Field of ``config.json``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """Which tokens are added, and what their rows begin with."""

    tokens: tuple[str, ...]
    pad_to_multiple_of: int = 128
    """Rows of the grown vocabulary are a multiple of it, so that tensor-parallel ranks can divide them."""
    noise: float = 0.1
    seed: int = 0

    def check(self) -> None:
        """Refuse impossible values."""
        require(bool(self.tokens), "There are no tokens to add.")
        odd = [token for token in self.tokens if not token.strip() or not token.isprintable()]
        require(not odd, f"{(odd or [''])[0]!r} cannot be a token: it must be printable text.")
        twice = len(self.tokens) - len(set(self.tokens))
        require(not twice, f"{twice} of the {len(self.tokens)} tokens are there twice. Name each once.")
        require_at_least("grow-vocabulary", self, 1, "pad_to_multiple_of")
        require_at_least("grow-vocabulary", self, 0, "noise", "seed")


def read_tokens(file: Path) -> tuple[str, ...]:
    """Return the tokens in a file, one a line."""
    return tuple(line for line in file.read_text(encoding="utf-8").splitlines() if line)


def added_token_ids(source: WeightSource) -> range:
    """Return the ids of the tokens that the vocabulary of a checkpoint, of any format, was grown by last.

    Raises:
        ConfigError: If its config names none.
    """
    found = source.config.get(ADDED_TOKEN_IDS)
    if isinstance(found, list) and len(found) == 2 and all(type(number) is int for number in found):
        first, end = found
        if 0 <= first < end <= source.shape.vocab_size:
            return range(first, end)
    raise ConfigError(
        f"model.train_only is new_tokens, but {ADDED_TOKEN_IDS} in the config of {source.path} is {found!r}: it names "
        "no new tokens. Add some with `megatron-ads convert grow-vocabulary`, or remove model.train_only."
    )


@dataclass(frozen=True)
class GrownTarget:
    """The Hugging Face folder ``target``, made of ``source``, which must be one too."""

    source: WeightSource
    target: Path
    growth: Growth

    @cached_property
    def folder(self) -> HfFolder:
        """The source as a folder.

        Raises:
            ConversionError: If it is in another format.
        """
        if not isinstance(self.source.container, HfFolder):
            raise ConversionError(
                f"{self.source.path} is a {self.source.kind}; convert it to a Hugging Face folder first."
            )
        return self.source.container

    @cached_property
    def tokenizer(self) -> dict[str, Any]:
        """The source's ``tokenizer.json``.

        Raises:
            ConversionError: If there is none, or it has one of the tokens.
        """
        file = self.folder.path / TOKENIZER
        if not file.is_file():
            raise ConversionError(
                f"{self.folder.path} holds no {TOKENIZER}. A tokenizer that is code (tokenization_*.py) must be "
                "converted to it first."
            )
        parsed = read_object(file)
        known = _ids(parsed, file)
        if there := [token for token in self.growth.tokens if token in known]:
            raise ConversionError(
                f"{file} has {len(there)} of the {len(self.growth.tokens)} tokens already, first {there[0]!r}. Leave "
                "them out, or grow the checkpoint that does not have them."
            )
        return parsed

    @cached_property
    def first(self) -> int:
        """Id of the first new token; the others follow."""
        return max(_ids(self.tokenizer, self.folder.path / TOKENIZER).values()) + 1

    @property
    def end(self) -> int:
        """One behind the id of the last new token."""
        return self.first + len(self.growth.tokens)

    @property
    def rows(self) -> int:
        """Rows of the grown vocabulary; those there were if the new tokens fit into them."""
        before, multiple = self.source.shape.vocab_size, self.growth.pad_to_multiple_of
        return before if self.end <= before else -(-self.end // multiple) * multiple

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json`` of the target."""
        return {**self.folder.config, "vocab_size": self.rows, ADDED_TOKEN_IDS: [self.first, self.end]}

    def plan(self) -> ConversionPlan:
        """Give every file of the source its grown form.

        Raises:
            ConversionError: If the tokenizer cannot be grown, or a growing tensor is quantised.
        """
        self.growth.check()
        if self.first > self.source.shape.vocab_size:
            raise DamagedCheckpointError(
                f"{TOKENIZER} has ids up to {self.first - 1}, and the model has {self.source.shape.vocab_size} tokens. "
                "Copy config and tokenizer from the same revision."
            )
        weights = self.folder.weight_files()
        read = (*weights, self.folder.path / TOKENIZER)
        side_files = find_side_files(self.folder.path, weights=weights)
        return ConversionPlan(
            source=self.source.path,
            target=self.target,
            files=tuple(self._plan_file(file) for file in self.folder.files),
            source_files=read,
            source_state=folder_state(read),
            tensor_count=len(self.source.names()),
            finishing=(INDEX, "config.json", *side_files.names),
            side_files=(side_files,),
        )

    @cached_property
    def _growing(self) -> dict[str, str]:
        """Return the stored tensors with a row for each token: Hugging Face name -> canonical name."""
        known = parameters(self.source.shape)
        growing = {part.name: name for name in TOKEN_TABLES if name in known for part in known[name].parts}
        return growing | {alias: name for alias, name in self.folder.aliases.items() if name in TOKEN_TABLES}

    def _plan_file(self, file: str) -> OutputFile:
        path = self.folder.path / file
        header = read_header(path)
        size = path.stat().st_size
        if not any(name in self._growing for name in header.tensors):
            with path.open("rb") as handle:
                start = handle.read(header.data_start)
            return OutputFile(file, start, size, (Copied(file, len(start), path, len(start), size - len(start)),))
        return self._grown_file(file, header)

    def _grown_file(self, file: str, header: SafetensorsHeader) -> OutputFile:
        stored = sorted(header.tensors.items(), key=lambda entry: entry[1].offset)
        entries = [
            HeaderEntry(name, tensor.dtype, (self.rows, *tensor.shape[1:]) if name in self._growing else tensor.shape)
            for name, tensor in stored
        ]
        start = build_header(entries, header.metadata)
        items: list[Item] = []
        position = len(start)
        for (name, tensor), entry in zip(stored, entries, strict=True):
            if name in self._growing:
                items += self._grown(name, tensor, position)
            else:
                items.append(Copied(name, position, tensor.file, tensor.offset, tensor.nbytes))
            position += entry.nbytes
        return OutputFile(file, start, position, tuple(items))

    def _grown(self, name: str, tensor: StoredTensor, offset: int) -> list[Item]:
        """Return the rows of one tensor: old, new, those kept behind the new ones, and those that fill up."""
        if tensor.dtype is torch.float8_e4m3fn:
            raise ConversionError(f"{name} in {tensor.file} is FP8; embeddings and output layers cannot grow so.")
        row, before, seed = tensor.columns * tensor.dtype.itemsize, tensor.rows, self.growth.seed
        canonical = self._growing[name]
        # An MTP layer's repeat has the rows of what it repeats.
        parameter = parameters(self.source.shape)[canonical]
        like = self.folder.tensors[parameter.parts[0].name]

        def drawn(first: int, end: int, noise: float) -> NewRows:
            return NewRows(
                name, offset + first * row, tensor.dtype, canonical, first, end, like, self.first, noise, seed
            )

        kept, filled = max(before - self.end, 0), max(before, self.end)
        items: list[Item] = [
            Copied(name, offset, tensor.file, tensor.offset, self.first * row),
            drawn(self.first, self.end, self.growth.noise),
        ]
        if kept:
            items.append(Copied(name, offset + self.end * row, tensor.file, tensor.offset + self.end * row, kept * row))
        return items + ([drawn(filled, self.rows, 0.0)] if filled < self.rows else [])

    def prepare(self, plan: ConversionPlan) -> None:
        """Carry the side files; config and tokenizer are the grown ones."""
        copy_side_files(self.folder.path, plan.target, skip=("config.json", TOKENIZER, TOKENIZER_CONFIG))
        write_small(plan.target / "config.json", json.dumps(self.config, indent=2) + "\n")
        numbered = list(enumerate(self.growth.tokens, self.first))
        added = [
            *self.tokenizer.get("added_tokens", []),
            *({"id": number, **_entry(token)} for number, token in numbered),
        ]
        grown = {**self.tokenizer, "added_tokens": added}
        write_small(plan.target / TOKENIZER, json.dumps(grown, ensure_ascii=False, indent=1) + "\n")
        if (self.folder.path / TOKENIZER_CONFIG).is_file():
            settings = read_object(self.folder.path / TOKENIZER_CONFIG)
            if isinstance(known := settings.get("added_tokens_decoder"), dict):
                settings["added_tokens_decoder"] = known | {str(number): _entry(token) for number, token in numbered}
            text = json.dumps(settings, ensure_ascii=False, indent=1)
            write_small(plan.target / TOKENIZER_CONFIG, text + "\n")

    def finish(self, plan: ConversionPlan, records: tuple[FileRecord, ...]) -> None:
        """Write the index, if the source has one."""
        if (self.folder.path / INDEX).exists():
            stored = {file.name: read_header(plan.target / file.name).tensors for file in plan.files}
            file_of = {name: file for file, tensors in stored.items() for name in tensors}
            write_index(
                plan.target, file_of, sum(each.nbytes for tensors in stored.values() for each in tensors.values())
            )


def _entry(token: str) -> dict[str, Any]:
    """Return how a tokenizer's files have a token that is part of the text and never comes apart."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"content": token, **flags}


def _ids(tokenizer: dict[str, Any], file: Path) -> dict[str, int]:
    """Return the id of every token of a parsed ``tokenizer.json``."""
    try:
        vocabulary = tokenizer["model"]["vocab"]
        # Unigram models have pairs of token and score, the others numbers by token.
        found = (
            vocabulary if isinstance(vocabulary, dict) else {pair[0]: place for place, pair in enumerate(vocabulary)}
        )
        return {**found, **{token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}}
    except (KeyError, TypeError, IndexError) as error:
        raise DamagedCheckpointError(f"{file} has no vocabulary that can be read ({error}). Copy it again.") from None
