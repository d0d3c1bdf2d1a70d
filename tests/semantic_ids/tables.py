"""Tables of semantic IDs without a codebook: every item of the simulator has one."""

from pathlib import Path

from megatron_ads.data.simulator.logs import still_tables
from megatron_ads.data.simulator.world import draw_world
from megatron_ads.semantic_ids.item_table import write_item_table


def simulated_ids(folder: Path, *, seed: int = 0) -> Path:
    """Write the table of a world; codes are kind and advertiser."""
    items = still_tables(draw_world(seed))["items"].to_pylist()
    codes = {item["item"]: (item["kind"], item["advertiser"]) for item in items}
    folder.mkdir(parents=True, exist_ok=True)
    write_item_table(folder, codes, {item["item"]: item["text"] for item in items}, version="test")
    return folder
