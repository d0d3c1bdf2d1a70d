"""Damaged and absurd inputs at every border of the project, and the commands that read them.

Each border writes one input, as its random numbers say, and returns the command line that a user would give it to.
"""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from megatron_ads import cli

_ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, 10**18, -(10**18), 10**400, 0.5, -0.0, 1e-300, 1e308,
    float("nan"), float("inf"), "", " ", "x", "é你好\u2028", "\x00", "../outside/x", "/etc/passwd",
    "a" * 5000, [], [[]], [1, 2], [None],
    {}, {"a": {}}, {"type": "yarn"}, "1",
    "deepseek_v2", "kimi_k2", "fp8", [64, 64], [0, 0], [10**18, 1], "F8_E4M3", "BF16",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """Folders of one border; everything but ``target`` must stay as it is."""

    root: Path

    @property
    def target(self) -> Path:
        """Where a command may write."""
        return self.root / "target"

    @property
    def source(self) -> Path:
        """A small checkpoint."""
        return self.root / "source"

    @property
    def input(self) -> Path:
        """The folder that holds what is mutated."""
        return self.root / "input"


Command = Callable[[], int]
Border = Callable[[Place, Random], Command]
"""Writes one input and returns the command line that reads it."""


def damage_bytes(data: bytes, chance: Random) -> bytes:
    """Return bytes with a few flipped, cut out, doubled, or replaced by noise."""
    found = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 5, 20])):
        place = chance.randrange(len(found) + 1)
        length = chance.choice([1, 1, 2, 8, 64])
        piece = chance.choice(
            [
                b"",
                chance.randbytes(length),
                bytes(found[place : place + length]) * 2,
                b"[" * 3000,
                b"9" * 5000,
                b'"',
                b"\n",
                b"\x00",
                b"\xff",
            ]
        )
        found[place : place + length] = piece
    return bytes(found[: chance.randrange(len(found) + 1)] if chance.random() < 0.15 else found)


def damage_values(value: Any, chance: Random) -> Any:
    """Return a JSON value in which one field, at any depth, is odd, missing, renamed, or one of another place."""
    if isinstance(value, dict) and value and chance.random() < 0.95:
        name = chance.choice(list(value))
        how, rest = chance.random(), {key: one for key, one in value.items() if key != name}
        if how < 0.15:
            return rest
        if how < 0.25:
            return rest | {chance.choice([name + "_", "../" + name, "", name.upper(), "a" * 3000]): value[name]}
        if how < 0.35:
            return value | {name: chance.choice(list(value.values()))}
        return value | {name: damage_values(value[name], chance)}
    if isinstance(value, list) and value and chance.random() < 0.8:
        place = chance.randrange(len(value))
        return [*value[:place], damage_values(value[place], chance), *value[place + chance.choice([0, 1, 1]) :]]
    return chance.choice(_ODD_VALUES)


def damage_json(value: Any, chance: Random) -> bytes:
    """Return the text of a JSON value, with odd fields or with damaged bytes."""
    for _ in range(chance.choice([1, 1, 2, 4])):
        value = damage_values(value, chance)
    text = json.dumps(value).encode()
    return damage_bytes(text, chance) if chance.random() < 0.25 else text


def _command(*words: object) -> Command:
    return lambda: cli.main([str(word) for word in words])


def _reading_checkpoint(place: Place, chance: Random) -> Command:
    return chance.choice(
        [
            _command("convert", "to-megatron", place.input, place.target),
            _command("convert", "to-megatron", place.input, place.target, "--format", "torch_dist"),
            _command("convert", "to-hf", place.input, place.target),
            _command("convert", "to-hf", place.source, place.target, "--reference", place.input),
            _command("verify", place.source, place.input),
            _command("plan", "--recipe", "sft/quickstart", "--model", place.input),
        ]
    )


def _link_checkpoint(place: Place, *, without: str) -> None:
    for file in place.source.iterdir():
        if file.name != without:
            (place.input / file.name).hardlink_to(file)


def config(place: Place, chance: Random) -> Command:
    """A checkpoint whose config.json is damaged."""
    _link_checkpoint(place, without="config.json")
    values = json.loads((place.source / "config.json").read_text())
    (place.input / "config.json").write_bytes(damage_json(values, chance))
    return _reading_checkpoint(place, chance)


def headers(place: Place, chance: Random) -> Command:
    """A checkpoint in which a safetensors header, its length, or the index is damaged."""
    files = sorted(place.source.glob("*.safetensors"))
    if chance.random() < 0.3 and len(files) > 1:
        index = "model.safetensors.index.json"
        _link_checkpoint(place, without=index)
        (place.input / index).write_bytes(damage_json(json.loads((place.source / index).read_text()), chance))
        return _reading_checkpoint(place, chance)
    chosen = chance.choice(files)
    _link_checkpoint(place, without=chosen.name)
    data = chosen.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = damage_json(json.loads(data[8:end]), chance)
    length = chance.choice([len(header)] * 5 + [0, 1, 2**63, 2**64 - 1, len(header) + 1, len(data)])
    body = data[end:] if chance.random() < 0.8 else damage_bytes(data[end:], chance)
    (place.input / chosen.name).write_bytes(length.to_bytes(8, "little") + header + body)
    return _reading_checkpoint(place, chance)


_ROW = {
    "id": "1",
    "task": "query_ad_relevance",
    "messages": [
        {"role": "user", "content": "Is it good?"},
        {"role": "assistant", "content": "<think>Yes.</think><Label>Good</Label>"},
    ],
    "weight": 1.0,
    "facts": {"query": "red shoes", "ad": "Shoes in red", "answer": "Good"},
}


def jsonl(place: Place, chance: Random) -> Command:
    """Chat rows of which some are damaged."""
    lines = [json.dumps(_ROW | {"id": str(number)}).encode() for number in range(4)]
    for number in range(chance.choice([1, 1, 3])):
        lines[number] = damage_json(json.loads(json.dumps(_ROW)), chance)
    text = chance.choice([b"\n", b"\n", b"\r\n", b"\n\n"]).join(lines)
    file = place.input / "rows.jsonl"
    file.write_bytes(damage_bytes(text, chance) if chance.random() < 0.2 else text)
    return _preview(place, chance, kind="jsonl", path=file)


def tables(place: Place, chance: Random) -> Command:
    """A CSV or Parquet file of one's own: damaged bytes, odd cells, columns of other types."""
    cells: dict[str, list[Any]] = {
        "q": ["red shoes", "pan", "café", "7"],
        "ad": ["Shoes, red", 'A "good" pan', "é\u2028", "x"],
        "label": ["Good", "Fair", "Bad", "Good"],
    }
    for _ in range(chance.choice([0, 1, 3])):
        cells[chance.choice(list(cells))][chance.randrange(4)] = chance.choice(_ODD_VALUES)
    file = place.input / chance.choice(["t.csv", "t.tsv", "t.parquet"])
    data = _parquet(cells, chance) if file.suffix == ".parquet" else _separated(cells, chance)
    file.write_bytes(damage_bytes(data, chance) if chance.random() < 0.6 else data)
    columns = {"query": "q", "title": "ad", "label": "label"}
    return _preview(place, chance, kind="table", path=file, task="query_ad_relevance", columns=columns)


def _separated(cells: dict[str, list[Any]], chance: Random) -> bytes:
    import csv

    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=chance.choice(",\t;"), lineterminator=chance.choice(["\n", "\r\n"]))
    writer.writerow(cells)
    writer.writerows(zip(*cells.values(), strict=True))
    return text.getvalue().encode()


def _parquet(cells: dict[str, list[Any]], chance: Random) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {}
    for name, values in cells.items():
        kinds = [pa.string()] * 4 + [
            pa.binary(),
            pa.large_string(),
            pa.int64(),
            pa.timestamp("ns"),
            pa.date32(),
            pa.float16(),
        ]
        kinds += [
            pa.list_(pa.string()),
            pa.struct([("a", pa.int32())]),
            pa.dictionary(pa.int32(), pa.string()),
            pa.null(),
        ]
        kind = chance.choice(kinds)
        try:
            columns[name] = pa.array([str(value) for value in values]).cast(kind)
        except (pa.ArrowException, NotImplementedError):
            columns[name] = pa.nulls(len(values), kind)
    out = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), out)
    return out.getvalue().to_pybytes()


def _preview(place: Place, chance: Random, **source: Any) -> Command:
    """Read the rows as a recipe's source does, sometimes with unusable ones written aside, and tokenize them."""
    from megatron_ads.config.data import AdsTask, SourceConfig, SourceKind
    from megatron_ads.data.chat import tokenize_row
    from megatron_ads.data.sources import read_source

    aside = str(place.target) if chance.random() < 0.5 else None
    source |= {"kind": SourceKind(source["kind"]), "path": str(source["path"]), "rejected": aside}
    if "task" in source:
        source["task"] = AdsTask(source["task"])

    def read() -> int:
        for row in read_source(SourceConfig(**source), seed=0):
            tokenize_row(row, _tokenizer(place.source))
        return 0

    return lambda: cli.exit_status("megatron-ads", read)


@cache
def _tokenizer(folder: Path) -> Any:
    from megatron_ads.data.chat import load_tokenizer

    return load_tokenizer(folder)


def recipes(place: Place, chance: Random) -> Command:
    """Settings on the command line: any key, any value, any syntax."""
    from omegaconf import OmegaConf

    from megatron_ads.config.run import SftConfig

    values = OmegaConf.to_container(OmegaConf.structured(SftConfig))
    given = []
    for _ in range(chance.choice([1, 1, 2, 4])):
        section = chance.choice(list(values))
        inner = values[section]
        key = (
            f"{section}.{chance.choice(list(inner))}" if isinstance(inner, dict) and chance.random() < 0.9 else section
        )
        value = chance.choice(
            [*map(str, _ODD_VALUES), "null", "[{kind: jsonl}]", "${log.dir}", "${", "1e999", "a=b", "'", "{a: 1"]
        )
        word = f"{chance.choice(['', '', '', '', '+', '++', '~'])}{key}={value}"
        given.append(damage_bytes(word.encode(), chance).decode(errors="ignore") if chance.random() < 0.2 else word)
    given = [word for word in given if not word.startswith("-") and "=" in word]
    if chance.random() < 0.2:
        return _command("check", "--recipe", "sft/quickstart", f"model.load={place.source}", *given)
    return lambda: cli.exit_status("megatron-ads", lambda: _plan(place, given))


def _plan(place: Place, given: list[str]) -> int:
    from megatron_ads.planning.hardware import CARDS
    from megatron_ads.planning.job import load_job
    from megatron_ads.planning.plan import make_plan

    make_plan(load_job("sft/quickstart", given, model=str(place.source)), CARDS["cpu"])
    return 0


BORDERS: dict[str, Border] = {
    "config": config, "dense": config, "headers": headers, "jsonl": jsonl, "tables": tables, "recipes": recipes,
}  # fmt: skip
