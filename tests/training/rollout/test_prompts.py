"""The prompts of a job: which are left out, and what is said of it."""

import json
from pathlib import Path

import pytest

from megatron_ads.config.data import DataConfig, SourceConfig, SourceKind
from megatron_ads.errors import DataError
from megatron_ads.training.rollout.prompts import open_prompts
from tests.data.tokenizers import tokenizer_in


def source(folder: Path, name: str, *contents: str) -> SourceConfig:
    lines = [
        {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}], "id": content}
        for content in contents
    ]
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return SourceConfig(kind=SourceKind.jsonl, path=str(folder / name))


def test_a_source_whose_prompts_are_all_too_long_is_told_of_the_lengths(tmp_path: Path) -> None:
    sources = [source(tmp_path, "short.jsonl", "a", "b"), source(tmp_path, "long.jsonl", "word " * 40, "word " * 41)]
    tokenizer = tokenizer_in(tmp_path)
    data = DataConfig(sources=sources[:1], seq_length=32)
    assert len(open_prompts(data, tokenizer, max_new_tokens=8, probe_rows=1).rows) == 2
    data.sources = sources
    with pytest.raises(
        DataError, match=r"None of the 2 prompts of .*long\.jsonl.* 32 - 8 = 24 tokens.*Raise data\.seq_length"
    ):
        open_prompts(data, tokenizer, max_new_tokens=8, probe_rows=1)
