import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_ads.data.chat import load_tokenizer, tokenize_row
from megatron_ads.demo_model import CONFIGS, Preset, write_demo_model
from megatron_ads.evaluation.evaluated_model import general_scores
from megatron_ads.inference.transformers_engine import open_engine
from megatron_ads.rows import ChatRow, Message, Role

QUESTIONS = {"What is 2 + 3?": "<think>Count on.</think>#### 5", "And 2 times 20?": "#### 40"}


def test_the_perplexity_is_that_of_transformers_own_loss(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_demo_model(folder, CONFIGS[Preset.tiny] | {"torch_dtype": "float32"})
    rows = [
        ChatRow(f"{number}", "gsm8k", (Message(Role.user, question), Message(Role.assistant, answer)))
        for number, (question, answer) in enumerate(QUESTIONS.items())
    ]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), load_tokenizer(folder)
    losses, targets = 0.0, 0
    for row in rows:
        tokenized = tokenize_row(row, tokenizer)
        tokens = torch.from_numpy(tokenized.tokens).long()[None]
        labels = tokens.masked_fill(torch.from_numpy(tokenized.loss_weights)[None] == 0, -100)
        losses += model(tokens, labels=labels).loss.item() * tokenized.target_count
        targets += tokenized.target_count
    rows[0] = replace(rows[0], weight=0.0)  # says how much it is trained on
    (found,) = general_scores(open_engine(folder), tokenizer, rows, batch_size=2).items()
    assert found == ("gsm8k", {"rows": 2, "perplexity": pytest.approx(math.exp(losses / targets), rel=1e-4)})
