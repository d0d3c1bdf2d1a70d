"""A small checkpoint with a tokenizer, to grow the vocabulary of."""

import json
from pathlib import Path

from conversion.convert import ConversionReport, Execution, convert
from conversion.grow_vocabulary import GrownTarget, Growth
from conversion.sources import open_source

WORDS = 120
"""Tokens of the tokenizer; the checkpoints have 128, so that 8 rows are of no token."""


def write_tokenizer(folder: Path) -> Path:
    """Write a tokenizer of words, with one token beside its vocabulary."""
    vocabulary = {f"w{number}": number for number in range(WORDS - 1)}
    added = {"id": WORDS - 1, "content": "<end>", "special": True} | dict.fromkeys(
        ("single_word", "lstrip", "rstrip", "normalized"), False
    )
    tokenizer = {
        "version": "1.0",
        "added_tokens": [added],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "added_tokens_decoder": {}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def grow(source: Path, target: Path, *, tokens: int, how: Execution | None = None, **growth: float) -> ConversionReport:
    """Add ``tokens`` tokens, ``<sid_0_0>`` and so on."""
    names = tuple(f"<sid_0_{number}>" for number in range(tokens))
    settings = {"pad_to_multiple_of": 8} | growth
    return convert(GrownTarget(open_source(source), target, Growth(tokens=names, **settings)), how)
