"""What a sensible model would say, read from the prompts alone: a script for a real server on loopback."""

import json
import re
from typing import Any

from megatron_ads.data.simulator.vocabulary import KINDS
from tests.inference.scripted_server import Reply

OFFERED = {kind.name: kind.offered_as for kind in KINDS}


def browsing_user(body: dict[str, Any], _: int) -> Reply:
    """Look at every ad, click on those that offer what is needed or are of a shop that was bought from, and go on."""
    prompt = body["messages"][0]["content"]
    need = re.search(r"Needs today: (.*)\.", prompt)
    shops = re.search(r"Bought lately from: (.*)\.", prompt)
    assert need is not None
    wanted = [*OFFERED[need[1]], *(shops[1].split(", ") if shops else [])]
    ads = re.findall(r"^(\d+)\. (.*)$", prompt, re.MULTILINE)
    clicks = [int(number) for number, text in ads if any(words in text for words in wanted)]
    said = {"looks": [int(number) for number, _ in ads], "clicks": clicks}
    return Reply(content=json.dumps({**said, "satisfaction": min(5, 1 + len(clicks)), "leaves": "Page 2" in prompt}))


def assistant(body: dict[str, Any], _: int) -> Reply:
    """Ask for shops once, search for all that was said, and recommend what was found."""
    messages = [message["content"] for message in body["messages"]]
    if messages[-1].startswith("Found:"):
        names = re.findall(r"^(.*) \(", messages[-1], re.MULTILINE)[:3]
        act: dict[str, Any] = {"recommend": names, "why": "You said so."}
    elif len(messages) == 1:
        act = {"ask": "Where did you buy before?", "about": "shop"}
    else:
        said = [messages[0].rpartition("User: ")[2], *(one for one in messages[1:] if one.startswith("I bought"))]
        act = {"call": "search", "query": " ".join(said)}
    return Reply(content=f"<think>hm</think>{json.dumps(act)}")
