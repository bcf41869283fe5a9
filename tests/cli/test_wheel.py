"""The README's first steps, by somebody who has the wheel and no clone."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import rlhf_toolkit
from tests.support.processes import ROOT, environment_of_tests
from tests.support.tiny import write_task

SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "src", "recipes", "accelerate_configs")


PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
BUILD_SDIST = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"


def built(folder: Path) -> Path:
    """The wheel that comes out of the source distribution of a copy of this tree."""
    source, sdist = folder / "source", folder / "sdist"
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    subprocess.run([sys.executable, "-c", BUILD_SDIST, str(sdist)], cwd=source, check=True, capture_output=True)
    (archive,) = sdist.iterdir()
    shutil.unpack_archive(archive, folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([*PIP, "wheel", *options, str(unpacked)], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def fresh_environment(folder: Path, wheel: Path) -> Path:
    """A virtual environment with that wheel, which finds the libraries of this one and nothing else of it."""
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin/python"
    subprocess.run([*PIP, f"--python={python}", "install", "--no-deps", str(wheel)], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return environment


@pytest.mark.thorough
def test_the_first_steps_of_the_readme_run_from_the_wheel_alone(tmp_path: Path) -> None:
    wheel, home = built(tmp_path), tmp_path / "home"
    fresh = fresh_environment(tmp_path, wheel)
    (library,) = fresh.glob("lib/python*/site-packages")
    home.mkdir()
    model = write_task(tmp_path)["model"]["name"]
    environment = {name: value for name, value in environment_of_tests().items() if name != "PYTHONPATH"}

    def rlhf(*words: str) -> str:
        command = [str(fresh / "bin/rlhf"), *words]
        done = subprocess.run(
            command, cwd=home, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    where = subprocess.check_output(
        [fresh / "bin/python", "-c", "import rlhf_toolkit; print(rlhf_toolkit.__file__)"], env=environment, text=True
    )
    assert Path(where.strip()).is_relative_to(library)
    assert wheel.name == f"rlhf_toolkit-{rlhf_toolkit.__version__}-py3-none-any.whl"
    assert rlhf("--version") == f"rlhf_toolkit {rlhf_toolkit.__version__}\n"
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
    versions = json.loads((home / "runs/first/summary.json").read_text())["versions"]
    assert versions["rlhf_toolkit"] == rlhf_toolkit.__version__
