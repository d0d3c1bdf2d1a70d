"""A small byte-level BPE tokenizer in DeepSeek's form, trained when needed on generated rows; always the same one.

Any text can be encoded. The built-in rows take about 65 tokens each, those about a simulated user about 250; a few
hundred common words of shops and ads keep real product texts short as well.
"""

import json
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_ads.config.data import AdsTask
from megatron_ads.data.ads_pairs import builtin_rows
from megatron_ads.data.simulator.simulated_rows import simulated_examples

BEGIN, END, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT, THINK, END_THINK = "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"
_CONTROL = (BEGIN, END, PAD)
_VISIBLE = (USER, ASSISTANT, THINK, END_THINK)
"""Single tokens, but part of the text, as in DeepSeek's tokenizer: decoding never drops them."""

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages if message['role'] == 'system' %}{{ message['content'] }}{%- endfor %}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{%- endif %}"
    "{%- if message['role'] == 'assistant' %}"
    "{{ '<｜Assistant｜>' + message['content'].split('</think>')[-1] + eos_token }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<｜Assistant｜>' }}{%- endif %}"
)
"""DeepSeek-R1's, without tools: reasoning of earlier answers is left out."""

_TRAINING_ROWS = 3000
_TRAINING_ROWS_PER_TASK = 60
"""Of the simulator; with more of them the built-in rows begin to take more tokens."""

_COMMON_WORDS = """
a about accessories adjustable adult adults air all aluminum an and animal any are around art as at automatic baby
back bag bags ball balls bamboo band bar base bath bathroom batteries battery be beach beauty bed bedroom belt best
big bike birthday black blanket blue board body book books boots bottle bottles bowl box boxes boy boys bracelet
brass bright brown brush bulb bulbs button by cable cake camera camp camping can candle candles cap capsules car
card cards care case cases cat cell ceramic chain chair charger chicken child children christmas clean cleaner
cleaning clear clips cloth clothes clothing coat coffee color colorful colors comfort comfortable compact compatible
computer control cool cord cotton count cover covers craft crafts cream crystal cup cups cut cutting dark daily day
decor decoration decorations decorative design desk diamond digital dinner display dog door double dress dry dual
durable ear easy edge electric electronics elastic energy extra eye fabric face family fast feet filter fit fitness
flat flexible floor flower foam food foot for fork free fresh friendly from front fruit full furniture game games
garden gel gift gifts girl girls glass gloves glow gold golf grade gray great green grip hair hand handle handmade
hands hanging hard hat head health healthy heat heavy high holder home hook hot hour house ice in inch inches indoor
ink into iron is it jacket jar jewelry key kids kit kitchen knife lace lamp large laser leather leaf led leg
leggings length light lighting lights line liner lock long loose low made magnetic makeup mask mat material mattress
medium memory men mens metal mini mirror modern motion mount mouse multi music nail natural neck necklace new night
no non nylon of office oil old on one open or organic organizer out outdoor oven over pack pad paint pan pants paper
party pen pencil perfect pet phone photo picture piece pieces pillow pink plant plants plastic plate plates play
player plug plus pocket polish portable pot power premium pro product products professional protection protective
protector pull pump purple quality quick rack rain red remote removable replacement resistant ribbon ring room round
rubber rug safe safety sensor set sets shampoo shape shaped sheet sheets shelf shelves shirt shirts shoe shoes short
shorts shower side sign silicone silver single size skin sleeve slim small smart smooth soap socks soft solar solid
sound space speaker sport sports spray spring square stainless stand star steel stick sticker stickers stone storage
straight strap straps strip strips strong style sugar sun super supplies support sweater swim switch system t table
tablets tall tank tape tea tee test the thick thin tool tools tooth top towel towels toy toys travel tray tree truck
tube type under unisex universal up usb use vintage vitamin vitamins wall warm wash washable water waterproof wear
wedding wet wheel white wide wine winter wire wired wireless with without women womens wood wooden wool work workout
wrap year years yellow yoga you your zinc zip query words title brand category missing none same other seller offers
asks has lacks
"""


@cache
def train_tokenizer(vocab_size: int) -> str:
    """Return the text of ``tokenizer.json`` with at most ``vocab_size`` tokens; trained once in a process."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*_CONTROL, *_VISIBLE],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_texts(), trainer)
    parsed: dict[str, Any] = json.loads(tokenizer.to_str())
    for token in parsed["added_tokens"]:
        token["special"] = token["content"] in _CONTROL
    return _as_json(parsed)


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``, chat template included."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 16384,
        "chat_template": CHAT_TEMPLATE,
    }
    for name, text in (("tokenizer.json", train_tokenizer(vocab_size)), ("tokenizer_config.json", _as_json(settings))):
        (folder / name).write_text(text, encoding="utf-8")


def _as_json(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, indent=1)


def _training_texts() -> Iterator[str]:
    simulated = (example.row for task in AdsTask for example in simulated_examples(task, _TRAINING_ROWS_PER_TASK))
    for row in chain(builtin_rows(_TRAINING_ROWS), simulated):
        yield from (message.content for message in row.messages)
    yield _COMMON_WORDS.replace("\n", " ")
