"""What a release is made of agrees: version, changes, tag, image, and the page for those who contribute."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from fnmatch import fnmatch

import rlhf_toolkit
from tests.cli.test_wheel import SOURCES
from tests.support.processes import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile with what follows each, lines that go on put together."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in whole if line)]


def of(name: str) -> list[str]:
    return [rest for each, rest in instructions() if each == name]


def test_the_version_stands_in_one_place_which_changes_and_tags_name() -> None:
    version = rlhf_toolkit.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert "version" not in PROJECT and PROJECT["dynamic"] == ["version"]
    assert re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[0] == version
    tags = subprocess.run(["git", "tag", "--points-at", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert {tag for tag in tags.stdout.split() if re.match(r"v\d", tag)} <= {f"v{version}"}


def test_the_image_is_built_of_what_the_wheel_is_built_of() -> None:
    copied = [rest.split() for rest in of("COPY")]
    sources = [source for *found, _ in copied for source in found]
    assert sorted(sources) == sorted(SOURCES), "the wheel's test builds from these, and no others"
    for *found, place in copied:
        assert all((ROOT / source).exists() for source in found)
        assert place == "./" or found == [place], f"{found} would lie in {place}, where nobody looks for it"
    assert of("WORKDIR")[0] == "/source" and [name for name, _ in instructions()].index("COPY") > 0


def test_what_the_image_leaves_out_is_nothing_of_ours() -> None:
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    tracked = subprocess.run(
        ["git", "ls-files", "src", "recipes", "accelerate_configs"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert tracked.stdout or not (ROOT / ".git").exists()
    assert not [
        (path, pattern)
        for path in tracked.stdout.split()
        for pattern in patterns
        if fnmatch(f"/{path}", pattern.replace("**", "*"))
    ]


def test_the_image_installs_the_project_with_extras_it_has_and_starts_its_command() -> None:
    (install,) = [rest for rest in of("RUN") if "pip install" in rest]
    (wanted,) = [word.strip("'") for word in install.split() if word.startswith("'")]
    extras = re.fullmatch(r"\.\[([\w,]+)\]", wanted)
    assert extras and set(extras[1].split(",")) <= PROJECT["optional-dependencies"].keys()
    assert re.findall(r"pip install (.*)", install) == [f"--no-cache-dir '{wanted}'"], "nothing beside the project"
    (entry,) = of("ENTRYPOINT")
    assert json.loads(entry) == [*PROJECT["scripts"]]
    (environment,) = of("RUN")[1:2]
    folder = environment.split()[-1]
    assert environment == f"python3 -m venv {folder}" and of("ENV")[0].startswith(f"PATH={folder}/bin:$PATH")
    ubuntu = re.search(r"ubuntu(\d\d)\.04$", of("FROM")[0])
    assert ubuntu and int(ubuntu[1]) >= 24, "its python3 is 3.12; requires-python is " + PROJECT["requires-python"]


def test_every_command_for_contributors_exists() -> None:
    blocks = re.findall(r"```\n(.*?)```", CONTRIBUTING, flags=re.DOTALL)
    commands = [line.partition("#")[0].split() for block in blocks for line in block.splitlines()]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for program, *words in commands:
        if program == "make":
            assert set(words) <= targets, words
        else:
            assert (program, *words[:2]) == (".venv/bin/python", "-m", "pytest")
            assert all((ROOT / word).exists() for word in words[2:])
    assert set(re.findall(r"`make ([\w-]+)", CONTRIBUTING)) <= targets
    assert re.search(r"^stage make test-thorough$", (ROOT / ".ci/run").read_text(), flags=re.MULTILINE)
