"""A Hugging Face checkpoint on this machine: as a teacher that answers, and as a judge of perplexity.

It runs one text at a time, on a GPU where there is one. Weights are loaded at the first use.
"""

import threading
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers import logging as transformers_logging

from megatron_ads.cooking.answering import Answer, Finish, Request
from megatron_ads.cooking.candidates import Candidate
from megatron_ads.cooking.config import AnsweringConfig
from megatron_ads.cooking.prompts import answer_of
from megatron_ads.data.chat import render_prompt, split_text
from megatron_ads.data.rows import ChatRow, Message, Role
from megatron_ads.data.tokenizer import ChatTokenizer, load_tokenizer
from megatron_ads.errors import ConversionError
from megatron_ads.journal import Journal, digest_of


class LocalModel:
    """A checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        """Load the tokenizer.

        Raises:
            DataError: If the folder has none.
        """
        self.folder = folder
        self.tokenizer: ChatTokenizer = load_tokenizer(folder)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def weights(self) -> Any:
        """The model; FP32 on a CPU, where BF16 is slower.

        Raises:
            ConversionError: If transformers cannot load the folder, or would have to make up weights.
        """
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                self.folder,
                dtype=torch.float32 if self.device.type == "cpu" else "auto",
                local_files_only=True,
                output_loading_info=True,
            )
        except (OSError, ValueError) as error:
            raise ConversionError(f"transformers cannot load {self.folder}: {error}") from None
        if missing := sorted(report["missing_keys"]):
            raise ConversionError(f"{self.folder} lacks {len(missing)} weights that the model needs: {missing[0]}.")
        model.generation_config = GenerationConfig()  # the checkpoint's own would add to what the recipe says
        return model.eval().to(self.device)

    @property
    def positions(self) -> int:
        """Longest text in tokens."""
        return int(getattr(self.weights.config, "max_position_embeddings", 2**31))


class LocalTeacher:
    """A checkpoint that answers as an endpoint would; equal requests have equal answers on equal machines."""

    def __init__(self, config: AnsweringConfig) -> None:
        """Load the tokenizer.

        Raises:
            DataError: If the folder has none.
        """
        assert config.model is not None, "checked with the recipe"
        self._config = config
        self._model = LocalModel(Path(config.model))
        self._lock = threading.Lock()

    @torch.inference_mode()
    def answer(self, request: Request, stop: threading.Event) -> Answer:
        """Return what the model writes; a prompt that leaves no room for an answer is refused."""
        tokenizer = self._model.tokenizer
        messages = [Message(Role(item["role"]), item["content"]) for item in request.body["messages"]]
        tokens = tokenizer.encode(render_prompt(messages, tokenizer))
        with self._lock:
            room = min(self._config.max_tokens, self._model.positions - len(tokens))
            if room < 1:
                return Answer(text=f"the prompt takes {len(tokens)} tokens", finish=Finish.refused)
            started = time.monotonic()
            torch.manual_seed(request.body["seed"])
            written = self._generate(tokens, room)
        ended = written[-1:] == [tokenizer.end_token_id]
        return Answer(
            text=tokenizer.decode(written[:-1] if ended else written),
            finish=Finish.ended if ended else Finish.cut_off,
            prompt_tokens=len(tokens),
            answer_tokens=len(written),
            seconds=time.monotonic() - started,
        )

    def _generate(self, tokens: list[int], room: int) -> list[int]:
        sampling: dict[str, Any] = {"do_sample": False}
        if self._config.temperature > 0:
            sampling = {"do_sample": True, "temperature": self._config.temperature, "top_p": self._config.top_p}
            sampling["top_k"] = 0
        input_BS = torch.tensor([tokens], device=self._model.device)
        end = self._model.tokenizer.end_token_id
        output_BS = self._model.weights.generate(
            input_ids=input_BS,
            attention_mask=torch.ones_like(input_BS),
            max_new_tokens=room,
            eos_token_id=end,
            pad_token_id=end,
            **sampling,
        )
        written: list[int] = output_BS[0, len(tokens) :].tolist()
        return written


class LocalScorer:
    """PPL of answers; numbers are kept in a journal, so that a resumed run does not compute them again."""

    def __init__(self, folder: Path, journal: Journal) -> None:
        """Load the tokenizer.

        Raises:
            DataError: If the folder has none.
        """
        self._model = LocalModel(folder)
        self._journal = journal

    def perplexity(self, candidate: Candidate) -> float | None:
        """Return PPL(answer | prompt, reasoning); None if they are longer than the model's positions."""
        row = candidate.row
        answer = answer_of(row)
        reasoned = Message(Role.assistant, candidate.target)
        prompt, target = split_text(ChatRow(row.id, row.task, (*row.prompt, reasoned)), self._model.tokenizer)
        before = prompt + target.removesuffix(answer)
        key = digest_of({"model": str(self._model.folder), "before": before, "answer": answer})
        record = self._journal.records.get(key)
        if record is None:
            record = {"perplexity": self._measure(before, answer)}
            self._journal.add(key, record)
        found: float | None = record["perplexity"]
        return found

    @torch.inference_mode()
    def _measure(self, before: str, answer: str) -> float | None:
        # Apart, so that no token holds the end of one and the beginning of the other.
        before_tokens, answer_tokens = map(self._model.tokenizer.encode, (before, answer))
        tokens = before_tokens + answer_tokens
        if len(tokens) > self._model.positions:
            return None
        input_BS = torch.tensor([tokens], device=self._model.device)
        logits_BSV: Tensor = self._model.weights(input_ids=input_BS, use_cache=False).logits
        predicted_SV = logits_BSV[0, len(before_tokens) - 1 : -1].float().log_softmax(-1)
        likelihood = predicted_SV.gather(1, input_BS[0, len(before_tokens) :, None]).mean()
        return float(torch.exp(-likelihood))
