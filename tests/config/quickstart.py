"""What the tests of recipes start from."""

from conversion.published_models import published_file
from megatron_ads.architecture import ModelShape, read_model_shape
from megatron_ads.config.recipes import load_recipe
from megatron_ads.config.run import SftConfig


def quickstart(*overrides: str) -> SftConfig:
    return load_recipe("sft/quickstart", ["model.load=runs/demo", *overrides])


def published(name: str) -> ModelShape:
    return read_model_shape(published_file(name))
