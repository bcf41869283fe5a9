"""What goes into the wheel: the package, and in it the recipes' scripts and the launch configs, which lie at the top of
a clone for people to find. Everything else about the project stands in pyproject.toml."""

from __future__ import annotations

from setuptools import find_packages, setup

FOLDERS = {"recipes": ["*.py"], "accelerate_configs": ["*.yaml"]}
"""Folders at the top, and what of them travels; ``src/rlhf_toolkit/cli/shipped.py`` finds it wherever it is."""

setup(
    packages=[*find_packages("src"), *(f"rlhf_toolkit.{folder}" for folder in FOLDERS)],
    package_dir={"": "src", **{f"rlhf_toolkit.{folder}": folder for folder in FOLDERS}},
    package_data={f"rlhf_toolkit.{folder}": patterns for folder, patterns in FOLDERS.items()},
)
