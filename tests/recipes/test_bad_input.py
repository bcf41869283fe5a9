"""Bad input to the PPO recipe: what each mistake costs, which is one line that names the value, the rule and the way
out.

Three tables, from cheap to dear: the experiment's file alone, one process that must refuse before it loads the model's
weights (they are deleted, so that loading them would be another error), and one rank of two that goes wrong. More
mistakes of one process: ``tests/support/mistakes.py``.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from rlhf_toolkit.errors import reported
from rlhf_toolkit.reporting import tracking
from rlhf_toolkit.settings.experiment import Experiment
from rlhf_toolkit.settings.loading import load_experiment, parse_overrides
from tests.support.builders import tiny_tokenizer
from tests.support.forked import RecipeProcesses
from tests.support.launch import Finished, run_recipe
from tests.support.tiny import WORDS, merged, write_experiment, write_task

SECONDS_TO_END = 200
"""Between a reward's failure on one rank and the end of the last process, also where other programs run. A rank that
waited for the process group's own limit would take far longer."""


def experiment_of(folder: Path, changes: dict[str, Any], **tokenizer: Any) -> Path:
    """A task of the folder's own, with ``changes`` in which ``{here}`` is the folder."""
    here = {name: v.format(here=folder) if isinstance(v, str) else v for name, v in changes.items()}
    task = merged(write_task(folder, **tokenizer), {"ppo.num_rollouts": 1, **here})
    return write_experiment(folder / "experiment.yaml", task)


def assert_refused(finished: Finished, line: str) -> None:
    """Status 1 and ``line`` as the last of the output, behind it at most its place in the file, with nothing that looks
    like a stack."""
    assert finished.status == 1, finished.output
    assert "Traceback" not in finished.output, finished.output
    last = finished.output.rstrip("\n").rpartition("\n")[2]
    assert without_place(last) == line


def without_place(line: str) -> str:
    """A message about a setting without the place in the file that it ends with."""
    return re.sub(r" \(\S+/experiment\.yaml, line \d+\)$", "", line)


# ---- the experiment's file, read without any model -------------------------------------------------------------------

CONFIG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown setting": (
        {"ppo.kl_coeff": 0.1},
        "ConfigError: unknown setting ppo.kl_coeff; did you mean ppo.kl_coef?",
    ),
    "setting of another section": (
        {"ppo.max_new_tokens": 8},
        "ConfigError: unknown setting ppo.max_new_tokens; did you mean rollout.max_new_tokens?",
    ),
    "unknown section": (
        {"rollouts.max_new_tokens": 8},
        "ConfigError: unknown section 'rollouts'; did you mean rollout?",
    ),
    "mini-batches that do not divide": (
        {"ppo.mini_batches": 3},
        "ConfigError: a rollout of 8 responses does not divide into ppo.mini_batches=3; try 2 or 4",
    ),
    "a micro-batch too small for one sequence": (
        {"update.micro_batch_tokens": 8},
        "ConfigError: update.micro_batch_tokens=8 cannot hold one sequence of 14 tokens (data.max_prompt_tokens + "
        "rollout.max_new_tokens); set it to 14 or more",
    ),
    "LoRA dropout": (
        {"model.lora_dropout": 0.05},
        "ConfigError: model.lora_dropout=0.05 must be 0: dropout makes the ratio differ from 1 before any update; "
        "the default is 0.0",
    ),
    "a word for a number": (
        {"ppo.num_rollouts": "many"},
        "ConfigError: ppo.num_rollouts='many' is not int; the default is 100",
    ),
    "no model": (
        {"model.name": ""},
        "ConfigError: model.name is missing; set it in the YAML file or as model.name=... on the command line",
    ),
}


@pytest.mark.parametrize("name", CONFIG)
def test_a_setting_that_cannot_work(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes, line = CONFIG[name]
    path = experiment_of(tmp_path, changes)
    capsys.readouterr()
    assert without_place(refusal(lambda: load_experiment(path), capsys)) == line


def test_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(lambda: load_experiment("/nowhere/ppo.yaml"), capsys) == (
        "ConfigError: cannot read the experiment /nowhere/ppo.yaml: No such file or directory; "
        "give the path of a YAML file"
    )


def test_a_file_that_is_no_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.yaml").write_text("model: [\n")
    line = refusal(lambda: load_experiment(tmp_path / "broken.yaml"), capsys)
    assert line.startswith(f"ConfigError: {tmp_path}/broken.yaml is not valid YAML: ")
    assert line.endswith("; repair it, or put text in quotes")


def test_an_override_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(lambda: parse_overrides(["kl_coef=0.1"]), capsys) == (
        "ConfigError: cannot read the override 'kl_coef='; write section.key=value, such as ppo.kl_coef=0.1"
    )


def refusal(action: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a script that does ``action`` ends."""
    with pytest.raises(SystemExit) as end, reported():
        action()
    assert end.value.code == 1
    output = capsys.readouterr()
    assert output.out == ""
    line, newline, rest = output.err.partition("\n")
    assert (newline, rest) == ("\n", "")
    return line


# ---- one process, before the weights are loaded ----------------------------------------------------------------------


def nothing(folder: Path) -> None:
    """No file is spoilt."""


def wrote(name: str, text: str) -> Callable[[Path], None]:
    """Writes a file in the task's folder, and the folders above it."""

    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

    return write


def another_run(folder: Path) -> None:
    """What a run with smaller adapters has left behind."""
    experiment: Experiment = load_experiment(folder / "experiment.yaml")
    settings = experiment.as_dict()
    settings["model"]["lora_rank"] = 2
    wrote("run/run.json", json.dumps(settings))(folder)
    wrote("run/log.jsonl", "{}\n")(folder)


@dataclass(frozen=True)
class Refused:
    """A mistake and the line it ends with; ``{here}`` is the task's folder."""

    line: str
    changes: dict[str, Any] = field(default_factory=dict)
    spoil: Callable[[Path], None] = nothing
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    before: str = ""


DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}  # as accelerate launch sets it
NO_ROOM = """
import shutil
from collections import namedtuple
usage = namedtuple("usage", "total used free")
shutil.disk_usage = lambda path: usage(2**30, 2**30 - 2**24, 2**24)
"""

REFUSED = {
    "prompts all too long": Refused(
        "DataError: all 24 prompts are longer than data.max_prompt_tokens=1; the shortest has 2 tokens, so set it to 2 "
        "or more",
        {"data.max_prompt_tokens": 1},
        wrote("prompts.jsonl", '{"prompt": "w1 w2"}\n' * 24),
    ),
    "empty dataset": Refused(
        "DataError: cannot read {here}/prompts.jsonl (split train): it holds no rows; give it at least one prompt, or "
        "name another split",
        spoil=wrote("prompts.jsonl", ""),
    ),
    "missing column": Refused(
        "DataError: no column 'question' for data.prompt_column; the columns are prompt; set data.prompt_column: "
        "prompt",
        {"data.prompt_column": "question"},
    ),
    "reward file that cannot be imported": Refused(
        "ConfigError: reward.function='{here}/reward.py:low_words': importing {here}/reward.py raised "
        "ZeroDivisionError: division by zero at reward.py:1; repair it, or give path/to/file.py:name",
        spoil=wrote("reward.py", "1 / 0"),
    ),
    "output folder inside a file": Refused(
        "CheckpointError: run.output_dir={here}/reward.py/run cannot be written: Not a directory; choose a folder you "
        "may write to",
        {"run.output_dir": "{here}/reward.py/run"},
    ),
    "output folder where nothing can be made": Refused(
        "CheckpointError: run.output_dir=/proc/run cannot be written: No such file or directory; choose a folder you "
        "may write to",
        {"run.output_dir": "/proc/run"},
    ),
    "no space left": Refused(
        "CheckpointError: run.output_dir={here}/run has 16 MiB of free space, a run needs at least 256; make room or "
        "choose another disk",
        before=NO_ROOM,
    ),
    "output folder of another run": Refused(
        "CheckpointError: run.output_dir={here}/run holds another run; continue it with --resume, replace it with "
        "--overwrite, or choose another folder",
        spoil=another_run,
    ),
    "output folder of something else": Refused(
        "CheckpointError: run.output_dir={here}/run holds files but no run.json, so it is not a run folder; choose "
        "another",
        spoil=wrote("run/thesis.tex", "years of work"),
        arguments=("--overwrite",),
    ),
    "resume of another experiment": Refused(
        "CheckpointError: {here}/run was started with model.lora_rank=2, now model.lora_rank=4; resume with the same "
        "settings",
        spoil=another_run,
        arguments=("--resume",),
    ),
    "several processes without DeepSpeed": Refused(
        "TopologyError: 2 processes without DeepSpeed: role slices need ZeRO; start with "
        "accelerate_configs/zero2_2gpu.yaml",
        environment={"WORLD_SIZE": "2"},
    ),
    "mixed precision of accelerate": Refused(
        "TopologyError: mixed_precision=bf16 in accelerate's config contradicts model.dtype: the base is loaded in "
        "that dtype and adapters stay in fp32; set mixed_precision: 'no'",
        environment={**DEEPSPEED, "ACCELERATE_MIXED_PRECISION": "bf16"},
    ),
    "gradient clipping in both": Refused(
        "TopologyError: gradient_clipping=0.5 in accelerate's config contradicts update.max_grad_norm=1.0; remove it "
        "from accelerate's config",
        environment={**DEEPSPEED, "ACCELERATE_GRADIENT_CLIPPING": "0.5"},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_the_weights_are_loaded(name: str, tmp_path: Path, recipe: RecipeProcesses) -> None:
    case = REFUSED[name]
    path = experiment_of(tmp_path, case.changes)
    case.spoil(tmp_path)
    (tmp_path / "model/model.safetensors").unlink()
    finished = recipe.run("--config", str(path), *case.arguments, before=case.before, environment=case.environment)
    assert_refused(finished, case.line.format(here=tmp_path, cwd=Path.cwd()))


def test_a_mistake_costs_nobody_the_run_that_is_to_be_replaced(tmp_path: Path, recipe: RecipeProcesses) -> None:
    path = experiment_of(tmp_path, {"data.prompt_column": "question"})
    another_run(tmp_path)
    assert recipe.run("--config", str(path), "--overwrite").status == 1
    assert (tmp_path / "run/log.jsonl").read_text() == "{}\n"


def test_after_a_mistake_the_same_command_starts(tmp_path: Path, recipe: RecipeProcesses) -> None:
    path = experiment_of(tmp_path, {})
    assert recipe.run("--config", str(path), "data.prompt_column=question").status == 1
    recipe.run("--config", str(path)).succeeded()


def test_after_a_mistake_in_the_first_rollout_the_same_command_starts(tmp_path: Path, recipe: RecipeProcesses) -> None:
    path = experiment_of(tmp_path, {"data.evaluation": "{here}/heldout.jsonl"})
    right = (tmp_path / "reward.py").read_text()
    (tmp_path / "reward.py").write_text(RAISES)
    assert recipe.run("--config", str(path)).status == 1
    (tmp_path / "reward.py").write_text(right)
    recipe.run("--config", str(path)).succeeded()


# ---- one process, while it trains ------------------------------------------------------------------------------------

RAISES = """
def of_whom(prompt):
    raise LookupError("nobody knows")


def low_words(prompts, responses, **columns):
    return [of_whom(prompt) for prompt in prompts]
"""
FULL_DISK = """
import errno
import rlhf_toolkit.reporting.run_log as run_log


def full(path, records):
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


run_log._append = full
"""


def test_a_reward_that_raises_shows_its_own_traceback(tmp_path: Path, recipe: RecipeProcesses) -> None:
    path = experiment_of(tmp_path, {})
    (tmp_path / "reward.py").write_text(RAISES)
    finished = recipe.run("--config", str(path))
    assert finished.status == 1
    lines = finished.output.splitlines()
    assert lines[-1].startswith(
        "RewardError: reward low_words raised LookupError: nobody knows; repair the function "
        "(see its traceback); the first of its 8 prompts was 'w"
    )
    assert lines[-3:-1] == ['    raise LookupError("nobody knows")', "LookupError: nobody knows"]
    assert sum("Traceback" in line for line in lines) == 1


def test_a_disk_that_fills_up(tmp_path: Path, recipe: RecipeProcesses) -> None:
    path = experiment_of(tmp_path, {})
    assert_refused(
        recipe.run("--config", str(path), before=FULL_DISK),
        f"OSError: [Errno 28] No space left on device: '{tmp_path}/run/log.jsonl'; make room on that disk, then "
        "continue with --resume",
    )


# ---- what looks wrong and must work ----------------------------------------------------------------------------------

OBSERVE = """
import rlhf_toolkit.runs.ppo as ppo_run

real = ppo_run.PPORun.train


def train(self):
    summary = real(self)
    sampling, model = self.trainer.maker.scored_sampler.sampling, self.trainer.model.causal_lm
    rows = model.get_input_embeddings().num_embeddings
    print(f"pad {sampling.pad_id}, stop {sampling.stop_ids}, rows {rows}")
    return summary


ppo_run.PPORun.train = train
"""


def observed(recipe: RecipeProcesses, path: Path) -> str:
    output = recipe.run("--config", str(path), before=OBSERVE).succeeded().output
    return next(line for line in output.splitlines() if line.startswith("pad "))


def test_pad_is_eos(tmp_path: Path, recipe: RecipeProcesses) -> None:
    path = experiment_of(tmp_path, {}, pad="</s>")
    assert observed(recipe, path) == "pad 1, stop (1,), rows 32"


def test_no_pad_token(tmp_path: Path, recipe: RecipeProcesses) -> None:
    path = experiment_of(tmp_path, {}, pad=None)
    assert observed(recipe, path) == "pad 0, stop (1,), rows 32"


def test_a_pad_token_without_a_row_in_the_embedding(tmp_path: Path, recipe: RecipeProcesses) -> None:
    path = experiment_of(tmp_path, {})
    tokenizer = tiny_tokenizer(words=WORDS, pad=None, chat_template=None)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == 32
    tokenizer.save_pretrained(tmp_path / "model")
    assert observed(recipe, path) == "pad 0, stop (1,), rows 32"


def test_prompts_that_are_too_long_are_dropped_and_counted(tmp_path: Path, recipe: RecipeProcesses) -> None:
    path = experiment_of(tmp_path, {"data.max_prompt_tokens": 3})
    output = recipe.run("--config", str(path)).succeeded().output
    assert f"{tmp_path}/prompts.jsonl: 15 of 24 prompts, 1 to 3 tokens; 9 dropped as too long\n" in output


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0123456789" * 4}, "CommError: "),
        ({"WANDB_API_KEY": "", "NETRC": "/nowhere/netrc", "HOME": "/nowhere"}, "UsageError: No API key configured."),
    ],
    ids=["unreachable", "no key"],
)
def test_wandb_goes_offline_and_says_so(
    environment: dict[str, str], reason: str, tmp_path: Path, recipe: RecipeProcesses
) -> None:
    path = experiment_of(tmp_path, {"run.wandb": "online"})
    environment = {**environment, "WANDB_INIT_TIMEOUT": "4", "WANDB_DATA_DIR": str(tmp_path)}
    output = recipe.run("--config", str(path), environment=environment).succeeded().output
    assert f"W&B could not be started online ({reason}" in output
    assert f"this run is logged offline in {tmp_path}/run/wandb, send it later with wandb sync" in output
    (offline,) = (tmp_path / "run/wandb").glob("offline-run-*")
    assert f"W&B         {offline}\n" in output
    assert len((tmp_path / "run/log.jsonl").read_text().splitlines()) == 1


def test_how_long_wandb_may_take() -> None:
    assert tracking.START_TIMEOUT_SECONDS <= 60


# ---- two ranks under ZeRO-3 ------------------------------------------------------------------------------------------

ONE_RANK = """
import os
import time
from pathlib import Path


def low_words(prompts, responses, **columns):
    scores = [float(len(response)) for response in responses]
    if os.environ["RANK"] != "1":
        return scores
    Path(__file__).with_name("misbehaved").write_text(str(time.time()))
    {misbehaviour}
"""
WANTED = "return one number for each of the 4 responses; the first of its 4 prompts was 'w"
REWARDS = {
    "wrong count": ("return scores[1:]", f"returned 3 scores; {WANTED}"),
    "None": (
        "return [*scores[:3], None]",
        "gave score None (NoneType); return a finite number for each response, or one for each of its tokens; "
        "its prompt was 'w",
    ),
    "string": ('return "good"', f"returned 'good' (str); {WANTED}"),
    "raises": (
        'raise LookupError("nobody knows")',
        "raised LookupError: nobody knows; repair the function (see its traceback); the first of its 4 prompts was 'w",
    ),
}


@pytest.mark.parametrize("name", REWARDS)
def test_a_reward_that_goes_wrong_on_one_rank_ends_all(name: str, tmp_path: Path) -> None:
    misbehaviour, message = REWARDS[name]
    path = experiment_of(tmp_path, {})
    (tmp_path / "reward.py").write_text(ONE_RANK.replace("{misbehaviour}", misbehaviour))
    finished = run_recipe(path, processes=2, stage=3, launcher=name == "raises")
    seconds = time.time() - float((tmp_path / "misbehaved").read_text())
    lines, said = finished.output.splitlines(), f"reward low_words {message}"
    assert finished.status not in (0, -9), finished.output
    assert seconds < SECONDS_TO_END, finished.output
    assert sum(line.startswith(f"[rank 1] RewardError: {said}") for line in lines) == 1, finished.output
    assert sum(line.startswith(f"RewardError: rank 1 failed in the reward: {said}") for line in lines) == 1
    assert not any(line.startswith("rlhf_toolkit.errors.RewardError") for line in lines), "a stack of ours"
    assert ("--- traceback of rank 1 ---" in lines) == (name == "raises")
    if name == "raises":
        trace = lines[lines.index("--- traceback of rank 1 ---") :]
        assert f"    {misbehaviour}" in trace
        assert "LookupError: nobody knows" in trace


LAUNCHES: dict[str, tuple[dict[str, Any], str]] = {
    "prompts of a rollout that do not divide": (
        {"rollout.prompts_per_rollout": 7},
        "ConfigError: rollout.prompts_per_rollout=7 does not divide among 2 processes; try 6 or 8",
    ),
    "more processes than prompts": (
        {"rollout.prompts_per_rollout": 2, "data.train_split": "train[:1]"},
        "DataError: {here}/prompts.jsonl gives 1 prompts for 2 processes, each of which needs one; add prompts or "
        "start at most 1 processes",
    ),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_two_ranks_refuse_together(name: str, tmp_path: Path) -> None:
    changes, line = LAUNCHES[name]
    path = experiment_of(tmp_path, changes)
    (tmp_path / "model/model.safetensors").unlink()
    finished = run_recipe(path, processes=2, stage=3)
    assert finished.status not in (0, -9), finished.output
    lines, line = finished.output.splitlines(), line.format(here=tmp_path)
    assert lines.count(line) + lines.count(f"[rank 1] {line}") == 2, finished.output


def test_settings_of_accelerate_that_contradict_the_experiment(tmp_path: Path) -> None:
    """Through accelerate's own YAML; the other contradictions are in tests/distributed/test_topology.py."""
    path = experiment_of(tmp_path, {})
    finished = run_recipe(path, processes=1, stage=3, launch_options={"gradient_accumulation_steps": 4})
    assert finished.status not in (0, -9), finished.output
    assert (
        "TopologyError: gradient_accumulation_steps=4 in accelerate's config contradicts update.micro_batch_tokens, "
        "which decides the micro-batches; set it to 1"
    ) in finished.output.splitlines()
    assert "Loading weights" not in finished.output
