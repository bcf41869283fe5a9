"""Start-up: which processes exist, on what device, under which ZeRO stage, and whether everybody agrees about it.

accelerate's YAML says *where* a run happens (processes, machines, ZeRO stage, offload); the experiment's YAML says
*what* happens. DeepSpeed's own settings are derived from the two here, and a contradiction between them is an error
that names both.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import psutil
import torch
from accelerate import PartialState
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero import Init
from torch import nn
from torch.distributed import distributed_c10d
from torch.torch_version import TorchVersion
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from rlhf_toolkit.distributed.collectives import all_gather, rank, world_size
from rlhf_toolkit.distributed.extensions import build_cpu_collectives
from rlhf_toolkit.distributed.machines import meeting, name_interface
from rlhf_toolkit.errors import TopologyError, at_a_good_end, at_any_other_end

ZERO_STAGES = (2, 3)
TIMEOUT_MINUTES = 120
MEETING_MINUTES = 10  # what a process waits for the others at the start, where one of them may have failed before
ADAPTER_BUCKET = 2**24  # elements of gradients that are reduced at once: 64 MiB, enough for the full rate of a link
FULL_BUCKET = 5 * 10**8  # DeepSpeed's own, where matrices of the base are trained
PREFETCHED_PARAMETERS, LIVE_PARAMETERS = 5 * 10**7, 10**9  # what ZeRO-3 gathers ahead, and keeps gathered, at most
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the first since PyTorch 2.9


@dataclass(frozen=True)
class Launch:
    """What ``accelerate launch`` asked for, read from the environment it sets."""

    processes: int
    zero_stage: int | None
    offload_optimizer: str
    offload_parameters: str
    shard_while_loading: bool
    gradient_accumulation_steps: str
    gradient_clipping: str
    mixed_precision: str
    deepspeed_config_file: str | None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Launch:
        """Read the variables accelerate sets; without them this is one plain process."""
        get = environment.get
        deepspeed = get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
        return cls(
            processes=int(get("WORLD_SIZE", "1")),
            zero_stage=int(get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")) if deepspeed else None,
            offload_optimizer=get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none"),
            offload_parameters=get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none"),
            shard_while_loading=get("ACCELERATE_DEEPSPEED_ZERO3_INIT", "true").lower() == "true",
            gradient_accumulation_steps=get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto"),
            gradient_clipping=get("ACCELERATE_GRADIENT_CLIPPING", "auto"),
            mixed_precision=get("ACCELERATE_MIXED_PRECISION", "no"),
            deepspeed_config_file=get("ACCELERATE_DEEPSPEED_CONFIG_FILE"),
        )

    def check(self, *, max_grad_norm: float) -> None:
        """Raise TopologyError where accelerate's settings contradict each other or the experiment's."""
        if self.processes > 1 and self.zero_stage is None:
            raise TopologyError(
                f"{self.processes} processes without DeepSpeed: role slices need ZeRO; start with "
                f"accelerate_configs/zero2_2gpu.yaml"
            )
        if self.zero_stage is not None and self.zero_stage not in ZERO_STAGES:
            raise TopologyError(
                f"zero_stage={self.zero_stage} in accelerate's config; the toolkit runs ZeRO stage 2 or 3"
            )
        if self.deepspeed_config_file is not None:
            raise TopologyError(
                f"accelerate's config names deepspeed_config_file={self.deepspeed_config_file}, but DeepSpeed's "
                "settings are derived from the experiment's YAML; remove it and set zero_stage and offload in "
                "accelerate's config"
            )
        if self.mixed_precision != "no":
            raise TopologyError(
                f"mixed_precision={self.mixed_precision} in accelerate's config contradicts model.dtype: the base is "
                "loaded in that dtype and adapters stay in fp32; set mixed_precision: 'no'"
            )
        if self.gradient_accumulation_steps not in ("auto", "1"):
            raise TopologyError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} in accelerate's config contradicts "
                "update.micro_batch_tokens, which decides the micro-batches; set it to 1"
            )
        clipping = None
        with suppress(ValueError):  # it may be any word
            clipping = float(self.gradient_clipping)
        if self.gradient_clipping != "auto" and clipping != max_grad_norm:
            raise TopologyError(
                f"gradient_clipping={self.gradient_clipping} in accelerate's config contradicts "
                f"update.max_grad_norm={max_grad_norm}; remove it from accelerate's config"
            )
        if self.offload_parameters != "none" and self.zero_stage != 3:
            raise TopologyError(
                f"offload_param_device={self.offload_parameters} needs zero_stage 3, not {self.zero_stage}"
            )


@dataclass(frozen=True)
class Topology:
    """Where this process stands. Made once, by ``start``."""

    launch: Launch
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """The one process that prints, writes and tracks."""
        return self.rank == 0


def start(*, max_grad_norm: float, timeout_minutes: float = TIMEOUT_MINUTES) -> Topology:
    """Check the launch, join the process group and return where this process stands.

    On a machine without GPU accelerate would make every rank "0 of 1" unless the gloo backend is named before anything
    else touches its state, so this must run first. Processes have ``MEETING_MINUTES`` to meet. From then on a
    collective that waits for longer than ``timeout_minutes`` fails, in this group and in those that DeepSpeed makes.
    """
    launch = Launch.from_environment()
    launch.check(max_grad_norm=max_grad_norm)
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 has deprecated; a user can do nothing about it.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        let_segments_grow(os.environ)
    if launch.zero_stage is not None and not has_gpu:
        build_cpu_collectives()
    # accelerate refuses its own YAML's fields beside a DeepSpeed config made in code; ours is made from those very
    # fields.
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
    atexit.register(leave_group)
    # torch gives groups that are made later, as DeepSpeed does, a time limit of their own, not the first one's, so its
    # default is set too.
    timeout = timedelta(minutes=timeout_minutes)
    vars(distributed_c10d).update(default_pg_timeout=timeout, default_pg_nccl_timeout=timeout)
    gloo = {"backend": "gloo"} if launch.zero_stage is not None and not has_gpu else {}
    name_interface()
    with meeting(), redirect_stdout(None):  # DeepSpeed prints that its op is there
        state = PartialState(timeout=min(timeout, timedelta(minutes=MEETING_MINUTES)), **gloo)
    if torch.distributed.is_initialized():
        distributed_c10d._set_pg_timeout(timeout)
        distributed_c10d._get_default_store().set_timeout(timeout)
    if gloo and world_size() > 1:
        at_a_good_end.append(end_process)
        at_any_other_end.append(end_process)
    topology = Topology(launch, rank(), world_size(), state.device)
    check_agreement(topology, state)
    return topology


def let_segments_grow(environment: MutableMapping[str, str]) -> None:
    """Have PyTorch's allocator grow its segments instead of adding new ones (``expandable_segments``), so that rollouts
    of changing widths do not fragment a card's memory. What the user has set stays. Only before CUDA is first used."""
    if sys.platform == "linux" and not any(name in environment for name in ALLOCATOR_VARIABLES):
        name = ALLOCATOR_VARIABLES[0 if TorchVersion(torch.__version__) >= "2.9" else 1]
        environment[name] = "expandable_segments:True"


def deepspeed_settings(
    topology: Topology, *, rows_per_rank: int, max_grad_norm: float, largest_adapter: int | None, trained: int
) -> dict[str, Any] | None:
    """DeepSpeed's whole configuration, or None without DeepSpeed.

    ``trained``: elements of all that is trained. DeepSpeed allocates its buffer of gradients whole (under ZeRO-2, where
    they are reduced while the backward goes on, two), 5e8 elements unless it is told otherwise.
    ``largest_adapter``: elements of the largest adapter matrix. Parameters up to that size stay whole on every rank,
    since gathering some 900 tiny matrices one by one costs more than it saves. None: there are no adapters, and
    DeepSpeed's own threshold is right.
    """
    launch = topology.launch
    if launch.zero_stage is None:
        return None
    on_gpu = topology.device.type == "cuda"
    zero: dict[str, Any] = {
        "stage": launch.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": on_gpu,
        "reduce_bucket_size": gradient_bucket(trained, adapters=largest_adapter is not None),
    }
    if launch.zero_stage == 3:
        zero["stage3_prefetch_bucket_size"] = PREFETCHED_PARAMETERS
        zero["stage3_max_live_parameters"] = zero["stage3_max_reuse_distance"] = LIVE_PARAMETERS
        if largest_adapter is not None:
            zero["stage3_param_persistence_threshold"] = largest_adapter
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    zero |= _offload(topology)
    if launch.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": launch.offload_optimizer, "pin_memory": on_gpu}
    return {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": rows_per_rank,
        "train_batch_size": rows_per_rank * topology.world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def gradient_bucket(trained: int, *, adapters: bool) -> int:
    """Elements of DeepSpeed's buffer of gradients: never more than there are."""
    return min(trained, ADAPTER_BUCKET if adapters else FULL_BUCKET)


@contextmanager
def sharded_loading(topology: Topology, dtype: torch.dtype) -> Iterator[None]:
    """Inside, transformers builds and loads models directly into ZeRO-3 shards, so no rank ever holds a whole copy.

    ZeRO casts what it shards while loading to the dtype its config names; this config lives only for the load.
    """
    if not shards_while_loading(topology):
        yield
        return
    sections = {"bf16": {"enabled": dtype == torch.bfloat16}, "fp16": {"enabled": dtype == torch.float16}}
    config = HfDeepSpeedConfig(  # transformers keeps only a weak reference: this name keeps it alive
        {"zero_optimization": {"stage": 3, **_offload(topology)}, "train_micro_batch_size_per_gpu": 1, **sections}
    )
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del config


def shards_while_loading(topology: Topology) -> bool:
    """Whether a base is sharded by ZeRO-3 before the engine is there."""
    return topology.launch.zero_stage == 3 and topology.launch.shard_while_loading


def shard(topology: Topology, module: nn.Module) -> None:
    """Leave this rank's part of every parameter of ``module`` that is whole yet: of rank 0's numbers, bit by bit and
    without a cast. A collective."""
    zero = {"stage": 3, "memory_efficient_linear": False, **_offload(topology)}  # the former would replace F.linear
    Init(module=module, config_dict_or_path={"zero_optimization": zero, "train_micro_batch_size_per_gpu": 1})


def _offload(topology: Topology) -> dict[str, Any]:
    """Where ZeRO-3 keeps the shards: while loading and afterwards it must be told the same."""
    device = topology.launch.offload_parameters
    return (
        {} if device == "none" else {"offload_param": {"device": device, "pin_memory": topology.device.type == "cuda"}}
    )


def check_engine(topology: Topology, model: nn.Module) -> None:
    """After the engine is built: the ZeRO stage is the one asked for, and under stage 3 every frozen parameter is
    really sharded."""
    stage = topology.launch.zero_stage
    if stage is None:
        return
    if not isinstance(model, DeepSpeedEngine) or model.zero_optimization_stage() != stage:
        raise TopologyError(
            f"asked for ZeRO stage {stage}, but the model runs as {type(model).__name__}; check the launch config"
        )
    if stage == 3:
        whole = [name for name, p in model.module.named_parameters() if not hasattr(p, "ds_id") and not p.requires_grad]
        if whole:
            raise TopologyError(
                f"ZeRO-3 does not shard {len(whole)} frozen parameters, first {whole[0]}; check the launch config"
            )


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still use on ``device``, the least of all ranks. On a CPU the machine's free memory
    is shared equally among its processes."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        mine = torch.cuda.mem_get_info(device)[0] + unused
    else:
        mine = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(all_gather(mine))


def end_process(status: int = 0) -> NoReturn:
    """End this process with ``status``, as Python would but without the teardown of the interpreter.

    There a gloo group's threads may abort the process ("terminate called without an active exception"), after a run
    that has ended well, and after one that was stopped they keep it for some ten seconds. Leaving the group does not
    end them, since every parameter that DeepSpeed shards holds the group (torch 2.13, deepspeed 0.19.8).
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def leave_group() -> None:
    """Take this process out of its group before the interpreter goes. A gloo group that is still there then may abort
    the process ("terminate called without an active exception"): its threads are torn down while they run. NCCL's group
    is left alone: after an error, leaving it could wait for a rank that never comes."""
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


def check_agreement(topology: Topology, state: PartialState) -> None:
    """Raise TopologyError where accelerate, the process group and the launch do not agree about the ranks, or where the
    ranks' cards cannot add known values."""
    if (state.num_processes, state.process_index) != (topology.world_size, topology.rank):
        raise TopologyError(
            f"accelerate believes this is process {state.process_index} of {state.num_processes}, torch.distributed "
            f"rank {topology.rank} of {topology.world_size}; start with accelerate launch and one of "
            "accelerate_configs/"
        )
    if topology.world_size != topology.launch.processes:
        raise TopologyError(
            f"{topology.launch.processes} processes were launched, but the group has {topology.world_size}"
        )
    ranks = all_gather(topology.rank)
    if ranks != list(range(topology.world_size)):
        raise TopologyError(f"ranks in the process group are {ranks}, expected 0 to {topology.world_size - 1}")
    total = torch.ones(1024, device=topology.device) * (topology.rank + 1)
    if topology.world_size > 1:
        torch.distributed.all_reduce(total)
    expected = topology.world_size * (topology.world_size + 1) / 2
    if not bool((total == expected).all()):
        raise TopologyError(
            f"an all-reduce of known values gave {total.unique().tolist()} instead of {expected}: the cards' "
            "peer-to-peer path is broken, as on RTX 40 cards; set NCCL_P2P_DISABLE=1"
        )
