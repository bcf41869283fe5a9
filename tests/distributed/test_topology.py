"""What ``accelerate launch`` may ask for, read from the environment that accelerate itself makes of its YAML."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_simple_launcher_cmd_env
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from rlhf_toolkit.distributed import topology as module
from rlhf_toolkit.distributed.topology import (
    ALLOCATOR_VARIABLES,
    Launch,
    Topology,
    check_engine,
    deepspeed_settings,
    free_memory,
    gradient_bucket,
    let_segments_grow,
    sharded_loading,
    start,
)
from rlhf_toolkit.errors import TopologyError
from rlhf_toolkit.models.loading import straight_to_device
from tests.support.launch import ROOT
from tests.support.processes import environment_of_tests

CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


def launch_of(config: Path) -> Launch:
    """The launch each process sees that ``accelerate launch --config_file config`` starts."""
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(config), "x.py"]))
    args.deepspeed_fields_from_accelerate_config = []
    args.main_process_port = 0  # accelerate looks whether the port is free, and another run may have it
    _, environment = (prepare_deepspeed_cmd_env if args.use_deepspeed else prepare_simple_launcher_cmd_env)(args)
    return Launch.from_environment({**environment, "WORLD_SIZE": str(args.num_processes)})


def config_with(folder: Path, deepspeed: dict[str, Any], **settings: Any) -> Path:
    """``cpu_zero3.yaml`` with changes, in its DeepSpeed section and beside it."""
    config = yaml.safe_load((ROOT / "accelerate_configs/cpu_zero3.yaml").read_text())
    section = {**config["deepspeed_config"], **deepspeed}
    path = folder / "accelerate.yaml"
    path.write_text(yaml.safe_dump({**config, **settings, "deepspeed_config": section}))
    return path


@pytest.fixture(autouse=True)
def no_launch_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate hands on what stands in the environment of the tests."""
    for name in ("WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_launch_config_we_ship(config: Path) -> None:
    launch = launch_of(config)
    launch.check(max_grad_norm=1.0)
    launch.check(max_grad_norm=0.5)
    assert launch.zero_stage == next((stage for stage in (2, 3) if f"zero{stage}" in config.stem), None)
    assert launch.shard_while_loading or launch.zero_stage != 3
    offloaded = "cpu" if "offload" in config.stem else "none"
    assert (launch.offload_optimizer, launch.offload_parameters) == (offloaded, offloaded)


def test_launches_of_one_machine_take_any_port_that_is_free() -> None:
    """Two runs on a machine: the second would find accelerate's default port taken."""
    settings = [yaml.safe_load(path.read_text()) for path in CONFIGS]
    assert {each["main_process_port"] for each in settings if each["num_machines"] == 1} == {0}


def test_a_plain_process() -> None:
    launch = Launch.from_environment({})
    launch.check(max_grad_norm=1.0)
    assert (launch.processes, launch.zero_stage) == (1, None)


@pytest.mark.parametrize(
    ("deepspeed", "settings", "message"),
    [
        ({"zero_stage": 1}, {}, "zero_stage=1 in accelerate's config; the toolkit runs ZeRO stage 2 or 3"),
        ({"zero_stage": 0}, {}, "zero_stage=0 in accelerate's config; the toolkit runs ZeRO stage 2 or 3"),
        (
            {"deepspeed_config_file": "ds.json"},
            {},
            "accelerate's config names deepspeed_config_file=ds.json, but DeepSpeed's settings are derived from the "
            "experiment's YAML; remove it and set zero_stage and offload in accelerate's config",
        ),
        (
            {},
            {"mixed_precision": "bf16"},
            "mixed_precision=bf16 in accelerate's config contradicts model.dtype: the base is loaded in that dtype and "
            "adapters stay in fp32; set mixed_precision: 'no'",
        ),
        (
            {"gradient_accumulation_steps": 4},
            {},
            "gradient_accumulation_steps=4 in accelerate's config contradicts update.micro_batch_tokens, which decides "
            "the micro-batches; set it to 1",
        ),
        (
            {"gradient_clipping": 0.5},
            {},
            "gradient_clipping=0.5 in accelerate's config contradicts update.max_grad_norm=1.0; remove it from "
            "accelerate's config",
        ),
        (
            {"gradient_clipping": "none"},
            {},
            "gradient_clipping=none in accelerate's config contradicts update.max_grad_norm=1.0; remove it from "
            "accelerate's config",
        ),
        (
            {"zero_stage": 2, "offload_param_device": "cpu"},
            {},
            "offload_param_device=cpu needs zero_stage 3, not 2",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_settings_that_contradict_the_launch_are_refused(
    deepspeed: dict[str, Any], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TopologyError) as caught:
        launch_of(config_with(tmp_path, deepspeed, **settings)).check(max_grad_norm=1.0)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "deepspeed",
    [
        {"gradient_accumulation_steps": 1},
        {"gradient_accumulation_steps": "auto"},
        {"gradient_clipping": 1},
        {"gradient_clipping": 1.0},
        {"gradient_clipping": "auto"},
        {"offload_param_device": "cpu", "offload_optimizer_device": "cpu"},
        {"zero3_init_flag": False},
    ],
    ids=str,
)
def test_what_agrees(deepspeed: dict[str, Any], tmp_path: Path) -> None:
    launch_of(config_with(tmp_path, deepspeed)).check(max_grad_norm=1.0)


def test_several_processes_need_deepspeed() -> None:
    with pytest.raises(TopologyError) as caught:
        Launch.from_environment({"WORLD_SIZE": "2"}).check(max_grad_norm=1.0)
    assert str(caught.value) == (
        "2 processes without DeepSpeed: role slices need ZeRO; start with accelerate_configs/zero2_2gpu.yaml"
    )


# ---- what is made of a launch ----------------------------------------------------------------------------------------


def topology_of(deepspeed: dict[str, Any], folder: Path) -> Topology:
    return Topology(launch_of(config_with(folder, deepspeed)), rank=0, world_size=2, device=torch.device("cpu"))


def test_deepspeed_settings_of_zero3(tmp_path: Path) -> None:
    topology = topology_of({"offload_param_device": "cpu", "offload_optimizer_device": "cpu"}, tmp_path)
    assert deepspeed_settings(topology, rows_per_rank=4, max_grad_norm=0.5, largest_adapter=100, trained=900) == {
        "zero_optimization": {
            "stage": 3,
            "contiguous_gradients": True,
            "overlap_comm": False,
            "reduce_bucket_size": 900,
            "stage3_prefetch_bucket_size": 5 * 10**7,
            "stage3_max_live_parameters": 10**9,
            "stage3_max_reuse_distance": 10**9,
            "stage3_param_persistence_threshold": 100,
            "stage3_gather_16bit_weights_on_model_save": True,
            "offload_optimizer": {"device": "cpu", "pin_memory": False},
            "offload_param": {"device": "cpu", "pin_memory": False},
        },
        "train_micro_batch_size_per_gpu": 4,
        "train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.5,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    without = deepspeed_settings(topology, rows_per_rank=4, max_grad_norm=0.5, largest_adapter=None, trained=10**10)
    assert without is not None
    assert "stage3_param_persistence_threshold" not in without["zero_optimization"], "a whole model would stay whole"


@pytest.mark.parametrize(
    ("trained", "adapters", "mebibytes"), [(81_000_000, True, 64), (1_000_000, True, 4), (7_600_000_000, False, 1907)]
)
def test_the_buffer_of_gradients_is_never_larger_than_they_are(trained: int, adapters: bool, mebibytes: int) -> None:
    assert gradient_bucket(trained, adapters=adapters) * 4 // 2**20 == min(mebibytes, trained * 4 // 2**20)


# ---- the allocator ---------------------------------------------------------------------------------------------------


def test_segments_grow_unless_the_user_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    for version, name in (("2.13.0+cu130", "PYTORCH_ALLOC_CONF"), ("2.8.1", "PYTORCH_CUDA_ALLOC_CONF")):
        monkeypatch.setattr(torch, "__version__", version)
        environment: dict[str, str] = {}
        let_segments_grow(environment)
        assert environment == {name: "expandable_segments:True"}
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        environment = {name: "max_split_size_mb:64"}
        let_segments_grow(environment)
        assert environment == {name: "max_split_size_mb:64"}
    monkeypatch.setattr(sys, "platform", "win32")
    let_segments_grow(environment := {})
    assert environment == {}, "PyTorch knows it on Linux only"


def test_the_start_asks_for_growing_segments_before_cuda_wakes_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator reads its settings when it first allocates, which joining the process group may do."""
    seen: dict[str, str | None] = {}

    def joined(**options: Any) -> Any:
        seen["at join"] = os.environ.get("PYTORCH_ALLOC_CONF")
        return SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))

    for name in ALLOCATOR_VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "PartialState", joined)
    start(max_grad_norm=1.0)
    assert seen == {"at join": "expandable_segments:True"}


def test_without_deepspeed_there_are_no_settings_and_nothing_to_check() -> None:
    topology = Topology(Launch.from_environment({}), rank=0, world_size=1, device=torch.device("cpu"))
    assert deepspeed_settings(topology, rows_per_rank=4, max_grad_norm=0.5, largest_adapter=100, trained=900) is None
    check_engine(topology, nn.Linear(2, 2))


def test_a_model_that_is_no_engine_although_zero_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(TopologyError) as caught:
        check_engine(topology_of({}, tmp_path), nn.Linear(2, 2))
    assert str(caught.value) == "asked for ZeRO stage 3, but the model runs as Linear; check the launch config"


def test_a_base_goes_straight_to_the_gpu_unless_it_is_sharded() -> None:
    """Else every process of ZeRO-2 would build it in host memory first."""
    for stage, device, options in (
        (None, "cuda:0", {"device_map": {"": torch.device("cuda:0")}}),
        (2, "cuda:1", {"device_map": {"": torch.device("cuda:1")}}),
        (3, "cuda:1", {}),
        (2, "cpu", {}),
    ):
        launch = replace(Launch.from_environment({}), zero_stage=stage)
        assert straight_to_device(Topology(launch, rank=0, world_size=1, device=torch.device(device))) == options


# ---- what everybody must agree about ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("believed", "launched", "ranks", "message"),
    [
        (
            (0, 1),
            2,
            [0, 1],
            "accelerate believes this is process 0 of 1, torch.distributed rank 0 of 2; start with accelerate launch "
            "and one of accelerate_configs/",
        ),
        ((0, 2), 4, [0, 1], "4 processes were launched, but the group has 2"),
        ((0, 2), 2, [0, 0], "ranks in the process group are [0, 0], expected 0 to 1"),
    ],
)
def test_disagreement(
    believed: tuple[int, int], launched: int, ranks: list[int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = Launch.from_environment({"WORLD_SIZE": str(launched)})
    topology = Topology(launch, rank=0, world_size=2, device=torch.device("cpu"))
    monkeypatch.setattr(module, "all_gather", lambda value: ranks)
    with pytest.raises(TopologyError) as caught:
        module.check_agreement(topology, SimpleNamespace(process_index=believed[0], num_processes=believed[1]))
    assert str(caught.value) == message


def test_cards_that_add_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    """As RTX 40 cards do whose peer-to-peer path is switched on although it does not work."""
    launch = Launch.from_environment({"WORLD_SIZE": "2"})
    topology = Topology(launch, rank=0, world_size=2, device=torch.device("cpu"))
    monkeypatch.setattr(module, "all_gather", lambda value: [0, 1])
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.zero_())
    with pytest.raises(TopologyError) as caught:
        module.check_agreement(topology, SimpleNamespace(process_index=0, num_processes=2))
    assert str(caught.value) == (
        "an all-reduce of known values gave [0.0] instead of 3.0: the cards' peer-to-peer path is broken, as on RTX 40 "
        "cards; set NCCL_P2P_DISABLE=1"
    )


# ---- what must not stay, and what all ranks must agree on ------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_models_are_built_in_shards_while_loading_and_only_then(fails: bool) -> None:
    """Also after an error: the next model of this process would be built empty."""
    launch = Launch.from_environment({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"})
    topology = Topology(launch, rank=0, world_size=1, device=torch.device("cpu"))
    with pytest.raises(ZeroDivisionError) if fails else nullcontext(), sharded_loading(topology, torch.bfloat16):
        assert is_deepspeed_zero3_enabled()
        if fails:
            raise ZeroDivisionError
    assert not is_deepspeed_zero3_enabled()


def test_free_memory_is_the_least_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that places its rollouts by its own would run other passes than the others."""
    asked: list[int] = []

    def all_gather(mine: int) -> list[int]:
        asked.append(mine)
        return [mine, mine - 5, mine + 7]

    monkeypatch.setattr(module, "all_gather", all_gather)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory(torch.device("cpu")) == 245 and asked == [250], "a machine's memory is shared by its processes"


ENDS = """
import atexit, sys, threading, time
from rlhf_toolkit.distributed.topology import end_process
from rlhf_toolkit.errors import at_a_good_end, reported

atexit.register(print, "at exit")
threading.Thread(target=lambda: (time.sleep(0.2), print("a thread"))).start()
at_a_good_end.append(end_process)
with reported():
    print("the script", end="")
print("never")
"""


def test_a_good_end_runs_what_python_would_run_and_nothing_after() -> None:
    done = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "the scripta thread\nat exit\n")


def test_a_bad_end_keeps_its_status() -> None:
    script = ENDS.replace('print("the script", end="")', "raise SystemExit(3)")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 3 and "at exit" in done.stdout


ALONE = """
import rlhf_toolkit.distributed.topology as topology
from rlhf_toolkit.errors import reported

topology.MEETING_MINUTES = 0.03
with reported():
    topology.start(max_grad_norm=1.0, timeout_minutes=120)
"""


def test_a_process_whose_partner_never_comes_ends_long_before_a_collective_would() -> None:
    launch = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    launch |= {"MASTER_PORT": "0", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE], env=environment_of_tests() | launch, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and "TopologyError: process 0 of 2 did not meet the others by 127.0.0.1" in done.stderr
