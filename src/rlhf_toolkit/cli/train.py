"""``rlhf train``: an experiment of any kind, on what this machine has, by accelerate's own launcher.

What is wrong with the settings is said before torch is imported. The run itself is a recipe's, the same script that
``accelerate launch`` is given; one process without DeepSpeed becomes that script.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from rlhf_toolkit.cli.machine import gpus
from rlhf_toolkit.cli.placement import Where, chosen, launch_settings
from rlhf_toolkit.cli.shipped import recipe
from rlhf_toolkit.cli.words import Argument, Command, Options, at_least_1, from_0
from rlhf_toolkit.errors import ConfigError
from rlhf_toolkit.last_words import COMMAND
from rlhf_toolkit.run_folders import require_usable
from rlhf_toolkit.settings.experiment import Experiment, FineTuning
from rlhf_toolkit.settings.kinds import KINDS, kind_of
from rlhf_toolkit.settings.listing import listing
from rlhf_toolkit.settings.loading import load_experiment, parse_overrides
from rlhf_toolkit.settings.yaml_text import file_text, read_yaml
from rlhf_toolkit.texts import say

FIRST_FILE = "experiment.yaml"
"""What ``rlhf init`` writes, and what is read where no file is named."""


def train(options: Options) -> None:
    """Train; this process ends with the run's status."""
    path = named(options.experiment)
    kind, experiment = read(path, options.overrides)
    where = placed(experiment, options)
    if not options.machine_rank:  # only the first machine writes there
        require_usable(Path(experiment.run.output_dir), resume=options.resume, overwrite=options.overwrite)
    say(f"{kind}: {where.text()}; results in {experiment.run.output_dir}")
    words = ["--config", str(path), *options.overrides]
    words += [f"--{name}" for name in ("resume", "overwrite") if vars(options)[name]]
    prepare_environment(where)
    if where.file is None:
        script = str(recipe(KINDS[kind].recipe))
        os.execv(sys.executable, [sys.executable, script, *words])
    from rlhf_toolkit.distributed.launcher import launch

    sys.exit(launch(recipe(KINDS[kind].recipe), words, where.launch_options()))


def check(options: Options) -> None:
    """Look at everything but the weights, and print what a run would begin with."""
    path = named(options.experiment)
    kind, experiment = read(path, options.overrides)
    where = placed(experiment, options)
    say(f"{kind}: {where.text()}; results in {experiment.run.output_dir}")

    # Only now torch and the libraries on it.
    from rlhf_toolkit.reporting.quiet import quiet_libraries
    from rlhf_toolkit.runs.check import checked

    quiet_libraries()
    settings = {} if where.file is None else launch_settings(where.file)
    for line in checked(experiment, processes=where.processes, zero_stage=where.stage, launch=settings):
        say(line)
    say(f"{path} is sound; only the weights have not been looked at: rlhf train {path}")


def named(experiment: str | None) -> Path:
    """The file of the experiment. Raises ConfigError where none is named and none lies here under the usual name."""
    if experiment is None and not Path(FIRST_FILE).is_file():
        raise ConfigError(
            f"there is no {FIRST_FILE} in {Path.cwd()}; name your file, or let rlhf init write a first one"
        )
    return Path(experiment or FIRST_FILE)


def read(path: Path, overrides: list[str]) -> tuple[str, Experiment | FineTuning]:
    """The kind of the experiment in ``path`` and its settings. Raises ConfigError."""
    values = read_yaml(file_text(path), f"{path} is not valid YAML")
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no sections such as model: and ppo:; write a first file with rlhf init")
    kind = kind_of(values, str(path))
    wanted: type[Experiment | FineTuning] = KINDS[kind].experiment
    return kind, load_experiment(path, parse_overrides(overrides), wanted)


def placed(experiment: Experiment | FineTuning, options: Options) -> Where:
    """Where it goes. Raises ConfigError where its sizes do not fit so many processes."""
    if options.nodes is not None and options.nodes > 1 and options.main_address is None:
        raise ConfigError(
            f"--nodes {options.nodes}, but nothing says where they meet; give --main-address with the first machine's "
            "address, and each machine its --machine-rank"
        )
    more = [("--machine_rank", options.machine_rank), ("--main_process_ip", options.main_address)]
    where = chosen(
        options.launch,
        options.processes,
        gpus=gpus(),
        quantised=experiment.model.quantization != "none",
        nodes=options.nodes,
        options=tuple(str(word) for pair in more if pair[1] is not None for word in pair),
    )
    if isinstance(experiment, Experiment):
        experiment.check_processes(where.processes)
    return where


def prepare_environment(where: Where) -> None:
    """What the processes find in their environment, unless the user has set it."""
    os.environ[COMMAND] = json.dumps(["rlhf", *sys.argv[1:]])
    if not where.gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if where.processes > 1:  # torch would start as many threads in each as there are cores in all
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // where.processes)))


def every_setting() -> str:
    """What ``rlhf train --help`` ends with."""
    return "\n".join(f"settings of {kind} ({about.about}):\n\n{listing(kind)}" for kind, about in KINDS.items())


WHERE = (
    Argument("--launch", metavar="FILE", help="accelerate's YAML file, or the name of one of accelerate_configs"),
    Argument(
        "--processes", type=at_least_1, metavar="N", help="in all; one for each GPU, or one on a CPU, unless said"
    ),
    Argument("--nodes", type=at_least_1, metavar="N", help="machines like this one; it is started on each"),
    Argument("--machine-rank", type=from_0, metavar="N", help="of several machines, which this is; the first is 0"),
    Argument("--main-address", metavar="ADDRESS", help="of several machines, the first one's address"),
)
EXPERIMENT = Argument("experiment", nargs="?", metavar="EXPERIMENT", help=f"its YAML file; default: {FIRST_FILE}")
OVERRIDES = Argument(
    "overrides",
    nargs="*",
    metavar="section.key=value",
    help="replaces a setting of the file; --section.key value and --section.key=value mean the same",
)
COMMANDS = (
    Command(
        "check",
        "look at everything about an experiment but the model's weights, in seconds",
        check,
        (EXPERIMENT, OVERRIDES, *WHERE),
        light=True,
        settings=True,
    ),
    Command(
        "train",
        "train what an experiment's file describes, on the GPUs of this machine or on its CPU",
        train,
        (
            EXPERIMENT,
            OVERRIDES,
            *WHERE,
            Argument("--resume", action="store_true", help="continue from the newest sound checkpoint"),
            Argument("--overwrite", action="store_true", help="replace the run in the run folder"),
        ),
        light=True,
        settings=True,
        more=every_setting,
    ),
)
