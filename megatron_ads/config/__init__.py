"""The typed schema of every recipe, its sections by what they are about, and how a recipe is composed onto it.

Enum members are lower case because OmegaConf reads an enum by its name, and that is what a recipe writes. The
dataclasses are not frozen because Hydra merges into them.
"""
