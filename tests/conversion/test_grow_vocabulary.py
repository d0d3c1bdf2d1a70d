"""A grown vocabulary has rows for new tokens, and every other byte of the checkpoint is what it was."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conversion.convert import Execution, to_shards
from conversion.grow_vocabulary import GrownTarget, Growth, read_tokens
from conversion.journal import open_journal
from conversion.sources import open_source
from conversion.verify import verify
from megatron_ads.cli import main
from megatron_ads.config.model import LayoutConfig
from megatron_ads.errors import ConfigError, ConversionError
from parity_tests.harness.dense_checkpoints import QWEN2
from parity_tests.harness.growing import WORDS, grow, write_tokenizer
from parity_tests.harness.hf_checkpoints import to_fp8, write_hf
from tests.models.checkpoints import V3, write_checkpoint

TABLES = {
    "model.embed_tokens.weight",
    "lm_head.weight",
    f"model.layers.{V3['num_hidden_layers']}.embed_tokens.weight",
    f"model.layers.{V3['num_hidden_layers']}.shared_head.head.weight",
}
TIED = {"tie_word_embeddings": True, "vocab_size": V3["vocab_size"]}
TOKENS = 20
END = WORDS + TOKENS


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An FP32 checkpoint of two files, of which one has neither embedding nor head."""
    folder = write_tokenizer(write_checkpoint(tmp_path_factory.mktemp("grow") / "v3", V3))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = ({}, {})
    for name, tensor in tensors.items():
        parts[name in TABLES or "norm" in name][name] = tensor
    weight_map = {}
    for number, part in enumerate(parts, 1):
        save_file(part, folder / f"model-{number}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture(scope="module")
def grown(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("grown") / "v3"
    grow(source, target, tokens=TOKENS)
    return target


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def test_all_but_the_new_rows_keep_their_bytes(source: Path, grown: Path) -> None:
    before, after = stored(source), stored(grown)
    assert before.keys() == after.keys()
    assert len(before) > 100
    for name, tensor in before.items():
        if name in TABLES:
            assert after[name].shape == (144, V3["hidden_size"])  # 140 tokens, rounded up to a multiple of 8
            assert torch.equal(after[name][:WORDS], tensor[:WORDS])
        else:
            assert torch.equal(after[name], tensor)
    assert (grown / "model-1.safetensors").read_bytes() == (source / "model-1.safetensors").read_bytes()


def test_new_rows_lie_around_the_mean_of_the_old_ones_and_fillers_on_it(grown: Path) -> None:
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        table = stored(grown)[name].double()
        old, new, fill = table[:WORDS], table[WORDS:END], table[END:]
        torch.testing.assert_close(fill, old.mean(0).expand_as(fill), rtol=2**-23, atol=0.0)  # rounded to FP32
        apart = (new - old.mean(0)) / old.std(0, correction=0)
        assert apart.std().item() == pytest.approx(0.1, rel=0.1)  # of 20 x 64 normal numbers, times noise = 0.1
        assert len(torch.unique(new, dim=0)) == TOKENS


def test_an_mtp_layer_repeats_the_new_rows_too(grown: Path) -> None:
    tensors = stored(grown)
    layer = f"model.layers.{V3['num_hidden_layers']}"
    assert torch.equal(tensors[f"{layer}.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(tensors[f"{layer}.shared_head.head.weight"], tensors["lm_head.weight"])


def test_config_and_tokenizer_know_the_new_tokens(grown: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    config = json.loads((grown / "config.json").read_text())
    assert (config["vocab_size"], config["added_token_ids"]) == (144, [WORDS, END])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(grown)
    assert tokenizer("w5<sid_0_3><sid_0_19> w7").input_ids == [5, WORDS + 3, WORDS + 19, 7]
    assert tokenizer.decode([5, WORDS + 3], skip_special_tokens=True).endswith("<sid_0_3>")


def test_it_opens_and_converts_like_any_checkpoint(grown: Path, tmp_path: Path) -> None:
    to_shards(grown, tmp_path / "shards", LayoutConfig(tp=2, pp=2))
    assert verify(grown, tmp_path / "shards").equal
    assert open_source(tmp_path / "shards").config["added_token_ids"] == [WORDS, END]


def test_the_logits_of_the_old_tokens_are_the_same_to_the_bit(source: Path, grown: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(3, 60)[None]
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits for folder in (source, grown)
    )
    assert torch.equal(before[..., :WORDS], after[..., :WORDS])
    assert not torch.equal(before[..., WORDS:], after[..., WORDS : before.size(-1)])


@pytest.mark.parametrize("stored_head", [False, True], ids=["embedding alone", "head stored too"])
def test_a_head_that_is_the_embedding_grows_with_it(tmp_path: Path, stored_head: bool) -> None:
    source = write_tokenizer(write_checkpoint(tmp_path / "tied", QWEN2 | TIED))
    tensors = load_file(source / "model.safetensors")
    if stored_head:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    grow(source, tmp_path / "grown", tokens=TOKENS)
    after = stored(tmp_path / "grown")
    assert after.keys() == tensors.keys()
    for name in TABLES & after.keys():
        assert torch.equal(after[name][:WORDS], tensors[name][:WORDS])
        assert torch.equal(after[name], after["model.embed_tokens.weight"])
    to_shards(tmp_path / "grown", tmp_path / "shards", LayoutConfig(tp=2))
    assert verify(tmp_path / "grown", tmp_path / "shards").equal


def test_rows_that_are_of_no_token_are_used_first(source: Path, tmp_path: Path) -> None:
    grow(source, tmp_path / "few", tokens=3)
    before, after = stored(source), stored(tmp_path / "few")
    for name in TABLES:
        changed = (before[name] != after[name]).any(1).nonzero().flatten().tolist()
        assert changed == [WORDS, WORDS + 1, WORDS + 2]


def test_a_seed_gives_the_same_rows_whatever_their_number_and_another_one_others(source: Path, tmp_path: Path) -> None:
    for name, tokens, seed in (("a", 20, 0), ("b", 30, 0), ("c", 20, 1)):
        grow(source, tmp_path / name, tokens=tokens, seed=seed)
    a, b, c = (stored(tmp_path / name)["lm_head.weight"][WORDS:END] for name in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_an_fp8_checkpoint_keeps_its_codes_and_scales(tmp_path: Path) -> None:
    values = load_file(write_checkpoint(tmp_path / "v3", V3) / "model.safetensors")
    write_tokenizer(write_hf(tmp_path / "fp8", V3, to_fp8(values)))
    grow(tmp_path / "fp8", tmp_path / "grown", tokens=TOKENS)

    def raw(file: Path) -> dict[str, torch.Tensor]:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name).view(torch.uint8) for name in opened.keys()}  # noqa: SIM118

    before, after = raw(tmp_path / "fp8" / "model.safetensors"), raw(tmp_path / "grown" / "model.safetensors")
    kept = [name for name in before if name not in TABLES]
    assert sum(name.endswith("_scale_inv") for name in kept) > 10
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert open_source(tmp_path / "grown").container.is_fp8  # type: ignore[union-attr]


def test_an_interrupted_growth_continues_with_its_own_settings_only(source: Path, tmp_path: Path) -> None:
    names, target = tuple(f"<sid_0_{number}>" for number in range(TOKENS)), tmp_path / "grown"
    plan = GrownTarget(open_source(source), target, Growth(tokens=names, pad_to_multiple_of=8)).plan()
    with pytest.raises(KeyboardInterrupt), open_journal(plan, resume=False):
        raise KeyboardInterrupt
    for other in ({"seed": 1}, {"noise": 0.2}, {"pad_to_multiple_of": 32}):
        with pytest.raises(ConversionError, match="other settings"):
            grow(source, target, tokens=TOKENS, how=Execution(resume=True), **other)
    assert grow(source, target, tokens=TOKENS, how=Execution(resume=True)).files == 2


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ((), "no tokens"),
        (("<a>", "<a>"), "1 of the 2 tokens are there twice"),
        (("w3", "<a>"), "1 of the 2 tokens already, first 'w3'"),
        (("<end>",), "already, first '<end>'"),
        (("a\nb",), "must be printable"),
    ],
    ids=["none", "twice", "a word", "an added token", "two lines"],
)
def test_tokens_that_cannot_be_added_are_refused(
    source: Path, tmp_path: Path, tokens: tuple[str, ...], message: str
) -> None:
    with pytest.raises((ConfigError, ConversionError), match=message):
        GrownTarget(open_source(source), tmp_path / "new", Growth(tokens=tokens)).plan()
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_without_tokenizer_json_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "v3", V3)
    with pytest.raises(ConversionError, match=r"holds no tokenizer\.json"):
        grow(folder, tmp_path / "new", tokens=1)


def test_the_command_takes_the_tokens_of_a_codebook(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sid").mkdir()
    (tmp_path / "sid" / "tokens.txt").write_text("<sid_0_0>\n<sid_0_1>\n")
    command = ["convert", "grow-vocabulary", source, tmp_path / "grown", "--sid", tmp_path / "sid", "--json"]
    assert main([*map(str, command), "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == 2
    assert not (tmp_path / "grown").exists()
    assert main(list(map(str, command))) == 0
    assert json.loads((tmp_path / "grown" / "config.json").read_text())["added_token_ids"] == [WORDS, WORDS + 2]


def test_a_file_of_tokens_has_one_a_line(tmp_path: Path) -> None:
    (tmp_path / "tokens.txt").write_text("<a>\n\n<b c>\n")
    assert read_tokens(tmp_path / "tokens.txt") == ("<a>", "<b c>")
