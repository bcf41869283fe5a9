"""Keys, tokens and passwords: by name from the environment, and in no file and no line."""

from __future__ import annotations

import json
import os
import random
import shutil
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf_toolkit.checkpoints import claim_run_folder, open_run_folder
from rlhf_toolkit.errors import RLHFError
from rlhf_toolkit.export.card import write_card
from rlhf_toolkit.export.finished import read_run
from rlhf_toolkit.reporting.tracking import WandbMirror
from rlhf_toolkit.runs.task import load_rewards
from rlhf_toolkit.settings.experiment import Experiment
from rlhf_toolkit.settings.loading import load_experiment, parse_overrides
from tests.strangers import frame, run_folders
from tests.strangers.ground import here

COUNT, LIMIT = 200, 30.0
HEAVY = ("wandb",)
NOTICES = False  # W&B starts git and a process of its own
KEYS = (
    *(
        "api_key",
        "apiKey",
        "API_KEY",
        "x-api-key",
        "key",
        "openai_api_key",
        "OPENAI_KEY",
        "access_key",
        "secret_access_key",
    ),
    *(
        "token",
        "hf_token",
        "github_token",
        "accessToken",
        "auth_token",
        "bearer",
        "refresh-token",
        "password",
        "passwd",
        "pwd",
    ),
    *("db_password", "passphrase", "secret", "client_secret", "clientSecret", "credentials", "Authorization", "auth"),
    *(
        "private_key",
        "cookie",
        "session_token",
        "jwt",
        "signature",
        "webhook_secret",
        "wandb_api_key",
        "apikey",
        "login",
    ),
)
FORMS = (
    *(
        "sk-{24}",
        "sk-proj-{30}",
        "sk-ant-api03-{40}",
        "hf_{34}",
        "ghp_{36}",
        "github_pat_{40}",
        "AKIA{UP16}",
        "AIza{35}",
        "xoxb-{20}",
    ),
    *("glpat-{20}", "Bearer {30}", "Basic {24}", "eyJ{20}.{30}.{20}", "npm_{36}", "nvapi-{40}", "gsk_{40}"),
)
PLACES = (
    "kwargs",
    "nested",
    "listed",
    "functions",
    "url",
    "user",
    "form",
    "environment",
    "in an address",
    "advantage",
    "train",
)


@dataclass(frozen=True)
class Case:
    """Settings with ``secret`` in them; ``variable`` where they name it."""

    name: str
    secret: str
    changes: dict[str, Any]
    variable: str = ""
    use: str = "run"


def cases(seed: int, count: int) -> Iterator[Case]:
    run_folders.sound()
    chance = random.Random(f"secrets {seed}")
    for number in range(count):
        place, use = PLACES[number % len(PLACES)], chance.choice(["run", "run", "error", "error", "yaml", "override"])
        use = "wandb" if number % 25 == 24 else use
        key, secret = chance.choice(KEYS), word(chance, chance.choice([8, 12, 24, 40]))
        if place == "form":
            secret = "".join(made(chance, chance.choice(FORMS)))
        changes = planted(place, key, secret, chance)
        variable = "STRANGERS_SECRET" if place in ("environment", "in an address") else ""
        yield Case(f"{number}: {place} {key} {use}", secret, changes, variable, use)


def word(chance: random.Random, length: int) -> str:
    return "Zq" + "".join(chance.choices(string.ascii_letters + string.digits, k=length - 2))


def made(chance: random.Random, form: str) -> Iterator[str]:
    for part in form.replace("{", "}").split("}"):
        if part.startswith("UP"):
            yield "".join(chance.choices(string.ascii_uppercase + string.digits, k=int(part[2:])))
        else:
            yield word(chance, int(part)) if part.isdecimal() else part


def planted(place: str, key: str, secret: str, chance: random.Random) -> dict[str, Any]:
    reward = "reward.py:score"
    functions = [{"function": reward, "name": "a"}]
    by_place: dict[str, dict[str, Any]] = {
        "kwargs": {"reward": {"function": reward, "kwargs": {key: secret}}},
        "nested": {"reward": {"function": reward, "kwargs": {"client": {key: {"value": secret}}}}},
        "listed": {"reward": {"function": reward, "kwargs": {"clients": [{key: secret}, {key: [secret]}]}}},
        "functions": {"reward": {"functions": [{**functions[0], "kwargs": {key: secret}}]}},
        "url": {"reward": {"functions": [{"url": f"http://127.0.0.1:9/x?a=1&{chance.choice(KEYS)}={secret}&b=2"}]}},
        "user": {"reward": {"function": reward, "kwargs": {"at": f"postgres://user:{secret}@host/db"}}},
        "form": {"reward": {"function": reward, "kwargs": {"note": secret}}},
        "environment": {
            "reward": {
                "function": reward,
                "kwargs": {"api_key": "${STRANGERS_SECRET}", "h": {"Authorization": "Bearer ${STRANGERS_SECRET}"}},
            }
        },
        "in an address": {"reward": {"functions": [{"url": "http://127.0.0.1:9/x?api_key=${STRANGERS_SECRET}"}]}},
        "advantage": {"ppo": {"advantage": "a.py:b", "advantage_kwargs": {key: secret}}},
        "train": {"data": {"train": f"https://{secret}@h/x.jsonl"}},
    }
    return by_place[place]


def run(case: Case) -> str:
    ground = here()
    Path("reward.py").write_text("def score(prompts, responses, **more):\n    return [0.0 for _ in responses]\n")
    settings = {
        "model": {"name": "some/model", "dtype": "float32"},
        "data": {"train": "x.jsonl"},
        "reward": {"function": "reward.py:score"},
        "run": {"output_dir": "run"},
    }
    settings |= case.changes
    settings["data"] = {"train": "x.jsonl", **settings["data"]}
    if case.variable:
        os.environ[case.variable] = case.secret
    Path("x.yaml").write_text(yaml.safe_dump(settings))
    said = ""
    try:
        said = used(case, settings)
    except RLHFError as error:
        said += str(error)
    leaks = [
        str(path) for path in Path("run").rglob("*") if path.is_file() and case.secret.encode() in path.read_bytes()
    ]
    shown = (ground.folder.parent / "log").read_text(errors="replace") + said
    if leaks or case.secret in shown:
        _detail[:] = [f"{leaks} {shown[-300:]}"]
        return frame.WRONGLY
    return frame.RIGHTLY


_detail = [""]


def detail() -> str:
    return _detail[0]


def used(case: Case, settings: dict[str, Any]) -> str:
    """Do with the experiment what a run would; return what was said."""
    if case.use == "yaml":
        Path("x.yaml").write_text(yaml.safe_dump(settings) + f"more: {{password: '{case.secret}\n")
        load_experiment("x.yaml")
    if case.use == "override":
        parse_overrides([f"reward.kwargs={{password: '{case.secret}"])
    experiment: Experiment = load_experiment("x.yaml")
    if case.use == "error":
        return wrong(case, settings, experiment)
    said = repr(experiment.as_dict())
    if case.variable:
        reward = load_rewards(experiment)
        reward.close()
    folder = Path("run")
    open_run_folder(folder, experiment.as_dict(), resume=False, overwrite=False)
    claim_run_folder(folder, experiment.as_dict(), overwrite=True)
    card(folder, experiment.as_dict())
    if case.use == "wandb":
        mirror = WandbMirror(mode="offline", project="p", name="n", folder=folder, config=experiment.as_dict())
        mirror.finish({})
    open_run_folder(folder, experiment.as_dict(), resume=True, overwrite=False)
    return said


def card(folder: Path, settings: dict[str, Any]) -> None:
    for path in run_folders.sound().iterdir():
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        elif path.name != "run.json":
            shutil.copy(path, folder / path.name)
    write_card(read_run(folder))


def wrong(case: Case, settings: dict[str, Any], experiment: Experiment) -> str:
    """Messages that quote settings: of another type, of an unknown entry, of a resumed run."""
    said = []
    for section, values in case.changes.items():
        for key, value in values.items():
            for bad in (
                {section: {key: [value, 3]}},
                {section: {key: {"x": value, "y": {1: 2}}}},
                {section: {**values, "unknown": value}},
            ):
                Path("bad.yaml").write_text(yaml.safe_dump({**settings, **bad}))
                try:
                    load_experiment("bad.yaml")
                except RLHFError as error:
                    said.append(str(error))
    folder = Path("run")
    open_run_folder(folder, experiment.as_dict(), resume=False, overwrite=False)
    claim_run_folder(folder, {**experiment.as_dict(), **{"reward": {"function": "other.py:x"}}}, overwrite=True)
    try:
        open_run_folder(folder, experiment.as_dict(), resume=True, overwrite=False)
    except RLHFError as error:
        said.append(str(error))
    return json.dumps(said)
