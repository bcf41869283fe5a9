"""Where a run goes: how many processes, and accelerate's settings for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_toolkit.cli.shipped import launch_configs
from rlhf_toolkit.errors import ConfigError, nearest, shortened
from rlhf_toolkit.settings.yaml_text import file_text, read_yaml

MEETING_PORT = 29500
"""Of the first machine of several; on one machine any free port does."""


@dataclass(frozen=True)
class Where:
    """``file`` is accelerate's YAML; without one the run is one plain process, which needs no launcher."""

    processes: int
    file: Path | None
    gpus: int
    stage: int | None = None
    options: tuple[str, ...] = field(default=())
    """More of accelerate's, such as which machine this is."""

    def launch_options(self) -> list[str]:
        """What ``accelerate launch`` is given."""
        return ["--config_file", str(self.file), "--num_processes", str(self.processes), *self.options]

    def text(self) -> str:
        """Where the run goes, in words."""
        device = "GPU" if self.gpus else "CPU"
        sharding = "no DeepSpeed" if self.stage is None else f"ZeRO-{self.stage}"
        by = "" if self.file is None else f", by {self.file.name}"
        return f"{self.processes} process{'es' if self.processes > 1 else ''} on {device}, {sharding}{by}"


def chosen(
    launch: str | None,
    processes: int | None,
    *,
    gpus: int,
    quantised: bool,
    nodes: int | None = None,
    options: tuple[str, ...] = (),
) -> Where:
    """Where a run goes on a machine with so many ``gpus``, or on so many ``nodes`` like it: what ``launch`` names, a
    file or one of ``accelerate_configs``, or one process for each GPU and one on a CPU, unless ``processes`` says how
    many there are in all.

    Several GPUs share the base by ZeRO-3, which needs least memory; a ``quantised`` one is small and stays whole, by
    ZeRO-2, unless machines share it. Raises ConfigError.
    """
    if launch is None and nodes is None and options:
        raise ConfigError(f"{options[0]} is of a run on several machines; give --nodes N, or --launch zero3_2nodes")
    path = None if launch is None else launch_file(launch)
    settings: Mapping[str, Any] = {"num_processes": max(1, gpus)} if path is None else launch_settings(path)
    written = settings.get("num_machines") or 1
    machines = nodes or written
    count = processes or settings["num_processes"] * machines // written
    if count % machines:
        raise ConfigError(f"{count} processes on {machines} machines; give --processes a multiple of {machines}")
    if gpus and count // machines > gpus and not settings.get("use_cpu"):
        raise ConfigError(
            f"{path or '--processes'} starts {count // machines} processes on a machine, but there are {gpus} GPUs "
            f"here; give --processes {gpus * machines} or less"
        )
    if path is None and count == 1:
        return Where(1, None, gpus)
    if path is None:
        path = launch_configs()[usual_launch(gpus=gpus, machines=machines, quantised=quantised)]
        settings = launch_settings(path)
    if nodes is not None:
        options = (*options, "--num_machines", str(nodes), "--deepspeed_multinode_launcher", "standard")
        options += () if settings.get("main_process_port") else ("--main_process_port", str(MEETING_PORT))
    stage = (settings.get("deepspeed_config") or {}).get("zero_stage", 2) if is_deepspeed(settings) else None
    return Where(count, path, gpus, stage, options)


def usual_launch(*, gpus: int, machines: int, quantised: bool) -> str:
    """The name of the launch config for several processes that nobody has named one for."""
    if not gpus:
        return "cpu_zero3"
    if machines > 1:
        return "zero3_2nodes"
    return "zero2_2gpu" if quantised else "zero3_2gpu"


def launch_file(name: str) -> Path:
    """The file of accelerate's settings that ``--launch`` names. Raises ConfigError."""
    known, path = launch_configs(), Path(name)
    if path.is_file():
        return path
    stem = name.removesuffix(".yaml")
    if stem in known:
        return known[stem]
    raise ConfigError(
        f"--launch {shortened(name, 80)[1:-1]} is no file{nearest(path.stem, known)}; give a YAML file of accelerate's "
        f"or one of {', '.join(known)}"
    )


def launch_settings(path: Path) -> Mapping[str, Any]:
    """What stands in a file of accelerate's settings. Raises ConfigError where it says no number of processes."""
    settings = read_yaml(file_text(path), f"{path} is not valid YAML")
    if not isinstance(settings, Mapping) or not is_count(settings.get("num_processes")):
        raise ConfigError(f"{path} has no num_processes: 1 or more; give a file that accelerate config has written")
    deepspeed = settings.get("deepspeed_config") or {}
    if not isinstance(deepspeed, Mapping) or not is_count(deepspeed.get("zero_stage", 2)):
        raise ConfigError(f"{path} has deepspeed_config={shortened(deepspeed, 80)}; write zero_stage: 2 or 3 below it")
    if not is_count(settings.get("num_machines") or 1):
        raise ConfigError(f"{path} has num_machines={shortened(settings['num_machines'], 80)}; write 1 or more")
    return settings


def is_count(value: Any) -> bool:
    """Whether it is a whole number from 1 up, which True is not."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_deepspeed(settings: Mapping[str, Any]) -> bool:
    """Whether accelerate is told to use DeepSpeed."""
    return str(settings.get("distributed_type", "")).upper() == "DEEPSPEED"
