"""Everything about a run that can be looked at without its weights: ``rlhf check``.

The parts are a run's own (``start.Kind``): what is refused here, a start refuses, and in the same words. Instead of the
base there is its skeleton on the meta device, names and shapes without numbers, from which the memory of each phase is
estimated as a run does it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from rlhf_toolkit.distributed.topology import Launch, Topology, free_memory
from rlhf_toolkit.errors import shortened
from rlhf_toolkit.models.loading import adapter_config, build_ppo_roles, load_model_config
from rlhf_toolkit.models.quantised import Quantisation
from rlhf_toolkit.models.quantised_loading import quantise_layers
from rlhf_toolkit.models.shared_base import NOWHERE, SharedBase
from rlhf_toolkit.models.slot_cache import column_bytes, state_bytes
from rlhf_toolkit.planning.memory import Placement, place
from rlhf_toolkit.planning.sizes import kept_bytes
from rlhf_toolkit.reporting.trackers import require_trackers
from rlhf_toolkit.rollout.decoding import Alone
from rlhf_toolkit.rollout.sampler import one_token
from rlhf_toolkit.rollout.sizes import model_size, needs_of, sharding
from rlhf_toolkit.run_claims import RUN_FILE, came_to_nothing
from rlhf_toolkit.run_folders import require_room
from rlhf_toolkit.runs.assembly import Setup
from rlhf_toolkit.runs.fine_tuning import FineTuningKind
from rlhf_toolkit.runs.memory import rollout_size
from rlhf_toolkit.runs.ppo import PPOKind
from rlhf_toolkit.runs.run import with_dtype
from rlhf_toolkit.runs.task import Task
from rlhf_toolkit.runs.weights import new_adapter
from rlhf_toolkit.settings.experiment import Experiment, FineTuning
from rlhf_toolkit.trainers.optimizers import require_optimizer

MADE_UP = "A made-up response: 42."
SCORED = 2
"""Prompts of whose made-up responses the reward is asked."""
ON_A_CARD = 2**30
"""Bytes of a GPU that CUDA and NCCL take for themselves, at most."""


def checked(
    experiment: Experiment | FineTuning, *, processes: int, zero_stage: int | None, launch: Mapping[str, Any]
) -> Iterator[str]:
    """Lines about the run that ``experiment`` describes on so many ``processes``, each as soon as it is known.
    ``launch`` has accelerate's settings, nothing where it has no part. Raises whatever a start would raise before it
    loads the model."""
    folder = Path(experiment.run.output_dir)
    require_room(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    asked = launch_of(processes, zero_stage, launch)
    asked.check(max_grad_norm=experiment.update.max_grad_norm)
    topology = Topology(asked, 0, processes, device)
    experiment = with_dtype(experiment, topology)
    kind = PPOKind(experiment, topology) if isinstance(experiment, Experiment) else FineTuningKind(experiment, topology)
    offloaded = asked.offload_optimizer != "none"
    require_optimizer(experiment.update.optimizer, device, offloaded=offloaded)
    require_trackers(experiment.run.watchers)
    model = experiment.model
    config = load_model_config(model.name, trust_remote_code=model.trust_remote_code, revision=model.revision)
    data: Any = kind.load_data(config)
    yield kind.opening(data).text(model, config)
    if isinstance(experiment, Experiment) and isinstance(data, Setup):
        yield from about_rewards(data.task)
        yield placement(data, config).description()
    yield f"{kind.rounds(data)} {kind.axis}s of {kind.updates_per_round} update(s)"
    folder = Path(experiment.run.output_dir)
    if (folder / RUN_FILE).exists() and not came_to_nothing(folder):
        yield f"{folder} holds a run: rlhf train --resume continues it, --overwrite replaces it"


def launch_of(processes: int, zero_stage: int | None, settings: Mapping[str, Any]) -> Launch:
    """What the processes of a launch with these ``settings`` of accelerate would find in their environment."""
    deepspeed = settings.get("deepspeed_config") or {}
    environment = {
        "WORLD_SIZE": processes,
        "ACCELERATE_USE_DEEPSPEED": str(zero_stage is not None).lower(),
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": zero_stage or 2,
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": deepspeed.get("offload_optimizer_device", "none"),
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": deepspeed.get("offload_param_device", "none"),
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": str(deepspeed.get("zero3_init_flag", True)).lower(),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": deepspeed.get("gradient_accumulation_steps", "auto"),
        "ACCELERATE_GRADIENT_CLIPPING": deepspeed.get("gradient_clipping", "auto"),
        "ACCELERATE_MIXED_PRECISION": settings.get("mixed_precision", "no"),
    }
    if "deepspeed_config_file" in deepspeed:
        environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = deepspeed["deepspeed_config_file"]
    return Launch.from_environment({name: str(value) for name, value in environment.items()})


def about_rewards(task: Task) -> Iterator[str]:
    """What the reward functions give a made-up response to the first prompts. Raises RewardError as a rollout would."""
    prompts = list(task.prompts[:SCORED])
    tokens = list(task.tokenizer(MADE_UP, add_special_tokens=False)["input_ids"]) or [0]
    try:
        scores = task.reward.collect(prompts, [MADE_UP] * len(prompts), [tokens] * len(prompts))
    finally:
        task.reward.close()
    for name, values in scores.parts.items():
        told = ", ".join(f"{value:g}" for value in values)
        yield f"reward {name}: {told} for {shortened(MADE_UP)} to the first {len(prompts)} prompt(s)"


# ---- memory ----------------------------------------------------------------------------------------------------------


def skeleton(experiment: Experiment, config: PretrainedConfig, *, value: bool, quantised: bool) -> SharedBase:
    """The base, ``quantised`` as the experiment says or not at all, and its adapters, without a number in them. Raises
    ModelError for adapters that are none, and for names of layers that the model has not."""
    model = experiment.model
    for setting, folder in (
        ("model.value_adapter", model.value_adapter),
        ("reward.adapter", experiment.reward.adapter),
    ):
        if folder is not None:
            adapter_config(folder, setting)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(
            config,
            dtype=getattr(torch, model.dtype),
            attn_implementation="eager",  # which every architecture has, and the meta device can run
            trust_remote_code=model.trust_remote_code,
        )
        if quantised and model.quantization != Quantisation.NONE:
            quantise_layers(base, Quantisation(model.quantization))
        adapter = new_adapter(model, base)
        if model.policy_adapter is not None:
            adapter = adapter_config(model.policy_adapter, "model.policy_adapter")
        return build_ppo_roles(
            base,
            adapter,
            policy_adapter=None,
            value_on=model.value_on if value else NOWHERE,
            gradient_checkpointing=model.gradient_checkpointing,
        )


def placement(setup: Setup, config: PretrainedConfig) -> Placement:
    """Where rollouts would run with the memory that is free now. Raises ConfigError where nothing fits."""
    experiment, topology, value = setup.experiment, setup.topology, setup.algorithm.trains_value
    on_cpu, stage, ranks = topology.device.type == "cpu", topology.launch.zero_stage or 0, topology.world_size
    with torch.no_grad():
        cache = one_token(skeleton(experiment, config, value=value, quantised=False), Alone())
    shared = skeleton(experiment, config, value=value, quantised=True)
    model = model_size(shared, column_bytes(cache), state=state_bytes(cache), on_cpu=on_cpu)
    size = rollout_size(
        experiment,
        setup.algorithm,
        setup.task.longest_prompt,
        ranks=ranks,
        held_out=len(setup.task.held_out),
        packing=experiment.update.packing != "off",
    )
    how = sharding(
        model,
        ranks=ranks,
        stage=stage,
        on_cpu=on_cpu,
        offloaded=topology.launch.offload_optimizer != "none",
        eight_bit=size.eight_bit,
    )
    share = free_memory(topology.device) // ranks if on_cpu else free_memory(topology.device) - ON_A_CARD
    free = max(0, share - kept_bytes(model, how, moments=False))
    return place(
        needs_of(model, how, size, experiment.rollout.weights),
        free=free,
        rows=size.rows,
        mode=experiment.rollout.mode,
        slots=experiment.rollout.slots,
        sharded=how.sharded,
    )
