"""Find the file of a recipe: one shipped with the package, or a YAML file of the user's own."""

import difflib
from pathlib import Path

from megatron_ads.errors import ConfigError


def recipes_folder() -> Path:
    """Return the folder of shipped recipes: beside this package, in a checkout as in an installation.

    Raises:
        ConfigError: If the installation lacks it.
    """
    folder = Path(__file__).resolve().parents[2] / "recipes"
    if not folder.is_dir():
        raise ConfigError(f"The shipped recipes are missing: {folder} does not exist. Install megatron-ads again.")
    return folder


def shipped_recipes(kind: str = "sft") -> tuple[str, ...]:
    """Return the names of the recipes that describe a whole job of one kind, as ``sft/quickstart``."""
    return tuple(f"{kind}/{file.stem}" for file in sorted((recipes_folder() / kind).glob("*.yaml")))


def locate_recipe(name_or_path: str, kind: str = "sft") -> tuple[Path, str, list[str]]:
    """Return Hydra's config folder, the config's name in it, and the overrides that let it find the shipped groups.

    Raises:
        ConfigError: If there is neither such a file nor such a recipe.
    """
    shipped, path = recipes_folder(), Path(name_or_path)
    if path.suffix == ".yaml":  # Hydra reads no other
        if not path.is_file():
            raise ConfigError(f"The recipe {name_or_path} does not exist.")
        path = path.resolve()
        if path.is_relative_to(shipped):
            return shipped, path.relative_to(shipped).with_suffix("").as_posix(), []
        quoted = str(shipped).replace("'", "\\'")
        return path.parent, path.stem, [f"hydra.searchpath=['file://{quoted}']"]
    if not (shipped / f"{name_or_path}.yaml").is_file():
        names = shipped_recipes(kind)
        near = difflib.get_close_matches(name_or_path, names, n=1, cutoff=0.4)
        hint = f"Did you mean {near[0]}?" if near else f"Shipped: {', '.join(names)}."
        raise ConfigError(f"There is no recipe {name_or_path!r}. {hint} A recipe of your own is given as FILE.yaml.")
    return shipped, name_or_path, []
