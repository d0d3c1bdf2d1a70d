"""Questions with four choices in a local file, and a small mixture of experts that knows their answers."""

import json
import random
from pathlib import Path
from typing import Any

from tests.data.tokenizers import VOCAB_SIZE, tokenizer_in

QUESTIONS = 24


def write_questions(data: Path, *, count: int = QUESTIONS) -> list[dict[str, Any]]:
    """Write ``mmlu_stem/test.jsonl`` below ``data`` and return its rows: sums, whose right choice is at any place."""
    draw = random.Random(7)
    rows = []
    for number in range(count):
        first, second = draw.randint(2, 99), draw.randint(2, 99)
        choices = [first + second, *draw.sample([value for value in range(4, 200) if value != first + second], 3)]
        draw.shuffle(choices)
        rows.append(
            {
                "question": f"How much is {first} and {second}?",
                "options": [str(value) for value in choices],
                "answer": "ABCD"[choices.index(first + second)],
                "topic": "sums",
                "id": number,
            }
        )
    folder = data / "mmlu_stem"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def write_learned_model(folder: Path, rows: list[dict[str, Any]], *, steps: int = 60) -> Path:
    """Write a DeepSeek-V3 of two layers with four experts each, trained on the letters alone.

    Raises:
        AssertionError: If it did not learn nine of ten.
    """
    import torch
    from transformers import DeepseekV3ForCausalLM

    folder.mkdir()
    tokenizer = tokenizer_in(folder)
    torch.manual_seed(3)
    model = DeepseekV3ForCausalLM(_config())
    begin = [token for token in tokenizer.fast("").input_ids if token == tokenizer.fast.bos_token_id]
    texts = [[*begin, *tokenizer.encode(f"{prompt_of(row)} {row['answer']}")] for row in rows]
    assert len({tokenizer.encode(f"Answer: {letter}")[-1] for letter in "ABCD"}) == 4
    longest = max(map(len, texts))
    # Padded behind: a causal model does not see it. The letter is the last token of each.
    tokens_BS = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    ends_B = torch.tensor([len(text) - 1 for text in texts])
    rows_B, letters_B = torch.arange(len(texts)), tokens_BS[torch.arange(len(texts)), ends_B]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        logits_BV = model(tokens_BS).logits[rows_B, ends_B - 1]
        loss = torch.nn.functional.cross_entropy(logits_BV, letters_B)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = (model(tokens_BS).logits[rows_B, ends_B - 1].argmax(-1) == letters_B).float().mean()
    assert right > 0.9, f"it knows {right:.0%} of the questions, the loss is {loss:.3g}"
    model.save_pretrained(folder)
    return folder


def scale_expert(source: Path, target: Path, *, factor: float, layer: int = 0) -> Path:
    """Write ``source`` with all weights of one expert of ``layer`` multiplied by ``factor``."""
    from safetensors.torch import load_file, save_file

    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    weights = load_file(target / "model.safetensors")
    for name, tensor in weights.items():
        if name.startswith(f"model.layers.{layer}.mlp.experts.1."):
            tensor *= factor
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def prompt_of(row: dict[str, Any]) -> str:
    """Return the question as the suite asks it, without examples."""
    choices = "\n".join(f"{letter}. {value}" for letter, value in zip("ABCD", row["options"], strict=True))
    return f"{row['question']}\n{choices}\nAnswer:"


def _config() -> Any:
    from transformers import DeepseekV3Config

    return DeepseekV3Config(
        vocab_size=VOCAB_SIZE, hidden_size=48, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_shared_experts=1, n_routed_experts=4, n_group=2, topk_group=1,
        num_experts_per_tok=2, first_k_dense_replace=0, q_lora_rank=24, kv_lora_rank=24, qk_rope_head_dim=8,
        qk_nope_head_dim=16, v_head_dim=16, bos_token_id=0, eos_token_id=1, initializer_range=0.1,
        max_position_embeddings=512,
    )  # fmt: skip
