"""A small simulated business that the tests of user simulation share."""

from pathlib import Path

import pytest

from megatron_ads.config.user_simulation import SimulatedWorldConfig
from megatron_ads.data.simulator.folder import Scale, write_simulation
from megatron_ads.downstream.pipeline import train_pipeline
from megatron_ads.downstream.pipeline_folder import save_pipeline
from megatron_ads.downstream.simulated_logs import read_logs
from tests.downstream.logs import settings


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> SimulatedWorldConfig:
    folder = tmp_path_factory.mktemp("business")
    write_simulation(folder / "logs", Scale(users=500, days=30))
    pipeline = train_pipeline(read_logs(folder / "logs"), settings("held_out=0.5", "ranker.epochs=1"))
    save_pipeline(pipeline, folder / "pipeline", trained_on={})
    return SimulatedWorldConfig(logs=str(folder / "logs"), pipeline=str(folder / "pipeline"))


@pytest.fixture
def given(world: SimulatedWorldConfig) -> list[str]:
    """Settings that name the business in a recipe."""
    return [f"world.logs='{world.logs}'", f"world.pipeline='{world.pipeline}'"]


@pytest.fixture
def out(tmp_path: Path) -> str:
    return str(tmp_path / "out")
