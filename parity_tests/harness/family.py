"""Every published model in small: its own ``config.json`` with other widths, in the form it is published.

:func:`run_every_command` takes one of them through all commands of ``megatron-ads``, in this process.
"""

import contextlib
import io
import json
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from conversion.published_models import published_config
from megatron_ads.demo_model import write_demo_model

_SMALL: dict[str, Any] = {
    "vocab_size": 768,
    "hidden_size": 160,
    "intermediate_size": 288,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 48,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 32,
    "num_experts_per_tok": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_SMALL_DENSE: dict[str, Any] = {
    "vocab_size": 768,
    "hidden_size": 160,
    "intermediate_size": 288,
    "num_hidden_layers": 3,
    "num_attention_heads": 10,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_TIED = {"tie_word_embeddings": True}
_KIMI_K2 = Path(__file__).parents[2] / "tests" / "fixtures" / "configs" / "kimi_k2_instruct.json"


@dataclass(frozen=True, slots=True)
class Member:
    """One published model."""

    config: dict[str, Any]
    fp8: bool = False
    power_of_two_scales: bool = False

    @property
    def split(self) -> tuple[str, int]:
        """Sizes to convert it for: its experts are divided, or where it has none its query groups."""
        return ("--ep", 2) if "n_routed_experts" in self.config else ("--tp", 2)


def _small(published: dict[str, Any], **changes: Any) -> dict[str, Any]:
    rank = published["q_lora_rank"] and 56
    left_out = ("quantization_config",)  # the writer's is as published
    fields = {name: value for name, value in published.items() if name not in left_out}
    return fields | _SMALL | {"q_lora_rank": rank} | changes


MEMBERS = {
    "DeepSeek-V2-Lite": Member(_small(published_config("deepseek_v2_lite"))),
    "DeepSeek-V3": Member(_small(published_config("deepseek_r1"))),  # as others publish it, in BF16
    "DeepSeek-R1-0528": Member(_small(published_config("deepseek_r1")), fp8=True),
    "DeepSeek-V3.1": Member(_small(published_config("deepseek_r1")), fp8=True, power_of_two_scales=True),
    "Moonlight-16B-A3B": Member(_small(published_config("moonlight_16b_a3b"))),
    "Kimi-K2": Member(_small(json.loads(_KIMI_K2.read_text())), fp8=True),
    "no shared experts": Member(_small(published_config("deepseek_r1"), n_shared_experts=0)),
    "R1-Distill-Qwen-7B": Member(published_config("deepseek_r1_distill_qwen_7b") | _SMALL_DENSE),
    # Their published siblings of up to 3 B tie their heads to the embedding.
    "Qwen2.5, tied": Member(published_config("deepseek_r1_distill_qwen_7b") | _SMALL_DENSE | _TIED),
    "R1-Distill-Llama-8B": Member(published_config("deepseek_r1_distill_llama_8b") | _SMALL_DENSE),
    "R1-Distill-Llama-8B, tied": Member(published_config("deepseek_r1_distill_llama_8b") | _SMALL_DENSE | _TIED),
    "Llama with biases": Member(
        published_config("deepseek_r1_distill_llama_8b") | _SMALL_DENSE | {"attention_bias": True}
    ),
}
"""V3, R1 and V3.1 have one structure; what is published differs in the number format."""


def write_member(folder: Path, member: Member) -> Path:
    """Write the checkpoint with a tokenizer."""
    write_demo_model(folder, member.config, fp8=member.fp8)
    if member.power_of_two_scales:
        _round_scales(folder)
    return folder


def _round_scales(folder: Path) -> None:
    """Quantise again by powers of two, as DeepSeek-V3.1 is published."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            weight, scales = name.removesuffix("_scale_inv"), tensors[name]
            tensors[name] = 2 ** scales.log2().ceil()
            ratio = (scales / tensors[name]).repeat_interleave(128, 0).repeat_interleave(128, 1)
            rows, columns = tensors[weight].shape
            codes = tensors[weight].float() * ratio[:rows, :columns]
            tensors[weight] = codes.to(torch.float8_e4m3fn)
        save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["scale_fmt"] = "ue8m0"
    (folder / "config.json").write_text(json.dumps(config, indent=2))


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one command line ended."""

    command: str
    status: int
    output: str
    errors: str


def run_every_command(name: str, root: Path) -> list[Outcome]:
    """Take a member through every command; a rank runs this without a process group of its own."""
    return list(_run_every_command(MEMBERS[name], root))


def _run_every_command(member: Member, root: Path) -> Iterator[Outcome]:
    folder, shards, run, tuned = (root / name for name in ("published", "shards", "run", "tuned"))
    write_member(folder, member)
    yield command("convert", "to-megatron", folder, shards, *member.split)
    yield command("verify", folder, shards)
    yield command("parity", "--hf", folder, "--megatron", shards, "--tokens", 24, "--out", root / "parity")
    yield command("compare-logits", shards, folder, "--tokens", 24)
    yield command("plan", "--recipe", "sft/quickstart", "--model", folder, *_training(folder, member, run))
    yield command("check", "--recipe", "sft/quickstart", *_training(shards, member, run))
    yield command("train", "--recipe", "sft/quickstart", *_training(shards, member, run))
    fp8 = ("--dtype", "fp8", "--reference", folder) if member.fp8 else ()
    yield command("convert", "to-hf", run / "export", tuned, *fp8)
    yield command("verify", run / "export", tuned, *(("--tolerance", 0.1) if member.fp8 else ()))
    yield command("convert", "to-hf", run / "export", root / "plain")
    yield command("compare-logits", run / "export", root / "plain", "--tokens", 24)
    rows = ("--recipe", "sft/quickstart", "--max-new-tokens", 2, *_ROWS)
    yield command("evaluate", "--model", run / "export", *rows)
    yield command("evaluate", "--model", folder, *rows)


_ROWS = ("data.sources=[{kind: builtin, rows: 60}]", "data.validation_rows=4")


def _training(load: Path, member: Member, run: Path) -> tuple[str, ...]:
    mtp = () if member.config.get("num_nextn_predict_layers") else ("model.mtp_loss_weight=0",)
    return (
        f"model.load={load}", f"log.dir={run}", "log.tensorboard=false", "train.max_steps=2", "optim.warmup_steps=1",
        "train.evaluate_every=null", "train.global_batch_size=2", "train.micro_batch_size=1", "layout.pp=1",
        "layout.ep=1", "layout.first_stage_layers=null", "runtime.threads=1", "checkpoint.save_every=2", *_ROWS, *mtp,
    )  # fmt: skip


def command(*words: object) -> Outcome:
    """Run a command line of ``megatron-ads`` and keep what it prints; ``train`` as its only rank."""
    from megatron_ads import cli
    from megatron_ads.training.__main__ import main as train

    arguments, output, errors = [str(word) for word in words], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            if arguments[0] == "train":
                sys.argv = arguments
                status = train()
            else:
                status = cli.main(arguments)
        except Exception:  # noqa: BLE001 - a process ends here: as the interpreter does, print the traceback, status 1
            status = 1
            traceback.print_exc()
    return Outcome(" ".join(arguments), status, output.getvalue(), errors.getvalue())
