"""The typed schema of every recipe, one module for each section, and how a recipe is composed onto it.

Enum members are lower case because OmegaConf reads an enum by its name, and that is what a recipe writes. The
dataclasses are not frozen because Hydra merges into them.
"""
