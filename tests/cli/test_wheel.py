"""The README's first steps, by somebody who has the wheel and no clone."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import ROOT, environment_of_tests
from tests.support.tiny import write_task

SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "src", "recipes", "accelerate_configs")


def installed(folder: Path) -> Path:
    """The wheel of this tree, built from a copy and put into a folder of its own."""
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", str(source), "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)], check=True
    )
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "lib"), str(wheel)], check=True)
    return folder / "lib"


@pytest.mark.thorough
def test_the_first_steps_of_the_readme_run_from_the_wheel_alone(tmp_path: Path) -> None:
    library, home = installed(tmp_path), tmp_path / "home"
    home.mkdir()
    model = write_task(tmp_path)["model"]["name"]
    environment = {**environment_of_tests(), "PYTHONPATH": str(library)}

    def rlhf(*words: str) -> str:
        command = [sys.executable, str(library / "bin/rlhf"), *words]
        done = subprocess.run(
            command, cwd=home, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert sorted(path.name for path in (library / "rlhf_toolkit/recipes").glob("*.py")) == sorted(
        path.name for path in (ROOT / "recipes").glob("*.py")
    )
    assert sorted(os.listdir(library / "rlhf_toolkit/accelerate_configs")) == sorted(
        os.listdir(ROOT / "accelerate_configs")
    )
    steps = re.search(r"^rlhf init && rlhf check && rlhf train$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert steps, "README's first steps are others"
    rlhf("init", "--model", model)
    experiment = home / "experiment.yaml"  # the tiny model has no chat template and no bfloat16 worth waiting for
    text = experiment.read_text().replace("\ndata:", "\ndata:\n  chat_template: false", 1)
    experiment.write_text(text.replace("num_rollouts: 5", "num_rollouts: 2"))
    assert "experiment.yaml is sound" in rlhf("check")
    assert "held-out" not in rlhf("train") and (home / "runs/first/policy/adapter_model.safetensors").is_file()
    log = (home / "runs/first/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["rollout"] for line in log] == [1, 2]
