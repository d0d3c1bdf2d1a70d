"""A checkpoint folder's tokenizer files, with a chat template of choice."""

import json
from pathlib import Path

from megatron_ads.data.chat import ChatTokenizer, load_tokenizer
from megatron_ads.data.demo_tokenizer import write_tokenizer

VOCAB_SIZE = 1024


def tokenizer_in(folder: Path, **changes: str | None) -> ChatTokenizer:
    """Write the demo tokenizer into ``folder`` with entries of ``tokenizer_config.json`` replaced or (None) removed."""
    write_tokenizer(folder, VOCAB_SIZE)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) | changes
    kept = {name: value for name, value in settings.items() if value is not None}
    file.write_text(json.dumps(kept), encoding="utf-8")
    return load_tokenizer(folder)
