"""Questions of every kind that commands ask, in local files, and a small mixture of experts that was taught to answer.

Its answers are readable and end, though most are wrong: what is compared is one engine with another.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_ads.config.recipes import load_job
from megatron_ads.data.chat import ChatTokenizer, load_tokenizer, render_prompt, tokenize_row
from megatron_ads.data.corpus import read_corpus
from megatron_ads.demo_model import CONFIGS, Preset, write_demo_model
from megatron_ads.rows import Message, Role
from tests.regress.learned_questions import prompt_of, write_questions

SMALL: dict[str, Any] = dict(CONFIGS[Preset.shallow]) | {
    "torch_dtype": "float32",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "n_routed_experts": 4,
    "intermediate_size": 128,
    "moe_intermediate_size": 48,
    "q_lora_rank": 48,
    "kv_lora_rank": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
"""Layer 0 is dense, layer 1 has experts. Plain RoPE, where the small models of other tests here have YaRN."""
SUMS = [(number, 3 * number + 1) for number in range(2, 10)]
PROGRAMS = {"double": "2 * number", "square": "number * number", "negate": "-number", "next_one": "number + 1"}
"""Functions of one number."""
Example = tuple[list[int], int]
"""Tokens of a text, and where in them the answer begins."""


def write_benchmarks(data: Path) -> None:
    """Write questions with choices, sums in words, and functions to complete, each where ``regress`` looks for them."""
    write_questions(data)
    sums = [{"question": sum_in_words(a, b), "answer": f"{a} + {b} = {a + b}.\n#### {a + b}"} for a, b in SUMS]
    programs = [
        {
            "task_id": f"Own/{number}",
            "prompt": beginning_of(name),
            "entry_point": name,
            "canonical_solution": f"    return {value}\n",
            "test": f"def check(candidate):\n    number = 3\n    assert candidate(number) == {value}\n",
        }
        for number, (name, value) in enumerate(PROGRAMS.items())
    ]
    for benchmark, rows in (("gsm8k", sums), ("humaneval", programs)):
        (data / benchmark).mkdir()
        (data / benchmark / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def sum_in_words(first: int, second: int) -> str:
    return f"Ann has {first} cups and buys {second}. How many cups has she?"


def beginning_of(name: str) -> str:
    return f"def {name}(number):\n"


def write_answering_model(folder: Path, data: Path, overrides: list[str], *, steps: int = 120) -> Path:
    """Write the model, taught on the benchmarks in ``data`` and on the rows that the quickstart would train on.

    Raises:
        AssertionError: If it learned too little for answers that can be read.
    """
    import torch

    from megatron_ads.inference.language_model import load_model

    write_demo_model(folder, SMALL)
    tokenizer = load_tokenizer(folder)
    examples = [*_choices(data, tokenizer), *_chats(tokenizer), *_rows(tokenizer, overrides)]
    model = load_model(folder)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    chance = torch.Generator().manual_seed(0)
    for _ in range(steps):
        drawn = torch.randperm(len(examples), generator=chance)[:12].tolist()
        batch = [examples[number] for number in drawn]
        longest = max(len(tokens) for tokens, _ in batch)
        # Padded behind: a causal model does not see it.
        tokens_BS = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in batch])
        labels_BS = torch.full_like(tokens_BS, -100)
        for row, (tokens, begin) in enumerate(batch):
            labels_BS[row, begin : len(tokens)] = tokens_BS[row, begin : len(tokens)]
        loss = model(tokens_BS, labels=labels_BS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.7, f"the loss is {loss:.3g}"
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    model.save_pretrained(folder)
    return folder


def _choices(data: Path, tokenizer: ChatTokenizer) -> Iterator[Example]:
    begin = [token for token in tokenizer.fast("").input_ids if token == tokenizer.fast.bos_token_id]
    for line in (data / "mmlu_stem" / "test.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        tokens = [*begin, *tokenizer.encode(f"{prompt_of(row)} {row['answer']}")]
        yield tokens, len(tokens) - 1


def _chats(tokenizer: ChatTokenizer) -> Iterator[Example]:
    said = [(f"Q: {sum_in_words(a, b)}\nA:", f"{a} + {b} = {a + b}. The answer is {a + b}.") for a, b in SUMS]
    for name, value in PROGRAMS.items():
        asked = "Complete this function. Answer with the whole of it, in one block of Python.\n\n```python\n"
        asked += f"{beginning_of(name)}```"
        said.append((asked, f"```python\n{beginning_of(name)}    return {value}\n```"))
    for question, answer in said:
        prompt = tokenizer.encode(render_prompt([Message(Role.user, question)], tokenizer))
        yield [*prompt, *tokenizer.encode(answer), tokenizer.end_token_id], len(prompt)


def _rows(tokenizer: ChatTokenizer, overrides: list[str]) -> Iterator[Example]:
    data = load_job("sft/quickstart", overrides, sections=["data"]).data
    for rows in read_corpus(data).training:
        for row in rows:
            tokenized = tokenize_row(row, tokenizer)
            yield tokenized.tokens.tolist(), len(tokenized.tokens) - tokenized.target_count
