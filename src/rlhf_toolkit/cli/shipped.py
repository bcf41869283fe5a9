"""Recipes and launch configs: in the wheel beside this package, in a clone at its top."""

from __future__ import annotations

from pathlib import Path

import rlhf_toolkit

PACKAGE = Path(rlhf_toolkit.__file__).parent
PLACES = (PACKAGE, PACKAGE.parents[1])


def shipped(folder: str) -> Path:
    """``recipes`` or ``accelerate_configs``, where this installation has it."""
    for place in PLACES:
        if (place / folder).is_dir():
            return place / folder
    raise FileNotFoundError(f"this installation of rlhf_toolkit lacks {folder}; install it again")


def recipe(name: str) -> Path:
    """The script of a recipe, such as ``ppo.py``."""
    return shipped("recipes") / name


def launch_configs() -> dict[str, Path]:
    """The launch configs by their names, such as ``zero3_2gpu``."""
    return {path.stem: path for path in sorted(shipped("accelerate_configs").glob("*.yaml"))}
