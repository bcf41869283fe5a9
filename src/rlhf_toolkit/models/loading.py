"""From a name to a SharedBase: hub or local folder, sharded while it loads where ZeRO-3 runs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_toolkit.distributed.collectives import agreement
from rlhf_toolkit.distributed.topology import Topology, shard, sharded_loading, shards_while_loading
from rlhf_toolkit.errors import DISK_FULL, ModelError, RLHFError, described, shortened
from rlhf_toolkit.given import MODEL, TOKENIZER, given_object
from rlhf_toolkit.models.adapter_files import read_lora_config, steps
from rlhf_toolkit.models.attention import PACKABLE, ROLE_ATTENTION
from rlhf_toolkit.models.folders import check_model_folder, check_weights_are_here
from rlhf_toolkit.models.given_model import take_over, weights_of
from rlhf_toolkit.models.quantised import Quantisation, require_kernels
from rlhf_toolkit.models.quantised_loading import QuantisedLoading
from rlhf_toolkit.models.renamed import config_value
from rlhf_toolkit.models.roles import POLICY, REFERENCE, REWARD, SCALAR_ROLES, VALUE
from rlhf_toolkit.models.shared_base import ON_ADAPTER, SharedBase
from rlhf_toolkit.models.stored_nf4 import check_stored, kept_whole, plain_config

REWARD_HEAD = "reward_head.safetensors"
MOST_IDS = 2**31
"""No vocabulary has so many tokens, and tokenizers take no larger number for one."""
MAIN = "main"
"""The branch of the hub that is meant where no revision is named."""
PEFTS_START = "kaiming"  # which PEFT calls True
MOST_PER_BYTE, SMALL = 4, 10**7
"""Numbers that one byte of a file may hold, which quantised ones come to, and how many more a matrix may have."""
ABOUT_SAMPLING = (
    *("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias"),
    *("suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "stop_strings"),
    *("exponential_decay_length_penalty", "min_length", "min_new_tokens", "guidance_scale", "penalty_alpha"),
)
"""What a generation config may say about the choice of a token; ``NEUTRAL`` are values that say nothing."""
NEUTRAL = dict.fromkeys(
    ("temperature", "top_p", "typical_p", "repetition_penalty", "encoder_repetition_penalty", "guidance_scale"),
    (None, 1, 1.0),
)
OWN_ATTENTION = (
    *("axk2", "deepseek_v32", "dots3_note", "dots3_note_text", "falcon", "glm_moe_dsa", "hy_v4", "minimax_m3_vl_text"),
)
"""Models whose code asks which of transformers' attention functions it runs with, and would leave out its sparse mask
with one of another name."""


def load_tokenizer(
    name: str, *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """The model's tokenizer, or a ModelError that says what to do. ``revision``, here and below, is the branch, tag or
    commit of a model of the hub; None: its main branch. A local folder has none."""
    tokenizer: PreTrainedTokenizerBase | None = given_object(TOKENIZER, name)
    if tokenizer is not None:
        return copy.deepcopy(tokenizer)
    check_model_folder(name)
    with explained(name, revision):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, revision=revision or MAIN)
    longest = tokenizer.model_max_length
    if not isinstance(longest, (int, float)):
        raise ModelError(
            f"{name} has model_max_length={shortened(longest)} in its tokenizer_config.json, which is no number; "
            "repair it"
        )
    return tokenizer


def load_model_config(name: str, *, trust_remote_code: bool = False, revision: str | None = None) -> PretrainedConfig:
    """The model's config without dropout and router noise: in PPO old and new log-probs must come from one function."""
    model = given_object(MODEL, name)
    if model is not None:
        config = copy.deepcopy(model.config)
        config.architectures = config.architectures or [type(model).__name__]  # as a saved one says
        text = config.get_text_config()
    else:
        check_model_folder(name)
        with explained(name, revision):
            config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, revision=revision or MAIN)
            text = config.get_text_config()  # which raises where there are two
    for part in {id(c): c for c in (config, text)}.values():
        for key, value in vars(part).items():
            if ("drop" in key or "jitter" in key) and isinstance(value, float):
                setattr(part, key, 0.0)
    return config


def generation_config_of(name: str, revision: str | None = None) -> GenerationConfig | None:
    """The model's generation config, where it has one. ModelError where that cannot be used."""
    model = given_object(MODEL, name)
    if model is not None:
        return cast(GenerationConfig | None, model.generation_config)
    try:
        return GenerationConfig.from_pretrained(name, revision=revision or MAIN)
    except OSError:
        return None
    except Exception as error:
        raise ModelError(f"{name} has a generation_config.json that cannot be used ({described(error)})") from error


def sampling_wishes_of(name: str, revision: str | None = None) -> dict[str, Any]:
    """How the model's generation config asks to sample: what changes the choice of a token, and nothing neutral."""
    found = generation_config_of(name, revision)
    wishes = {wish: getattr(found, wish, None) for wish in ABOUT_SAMPLING}
    return {wish: value for wish, value in wishes.items() if value not in NEUTRAL.get(wish, (None, 0, 0.0, [], {}))}


def generation_eos_of(name: str, config: PretrainedConfig, revision: str | None = None) -> int | list[int] | None:
    """The tokens that end the model's text, by its generation config or, without one, by its config."""
    generation = generation_config_of(name, revision)
    found = config.get_text_config().eos_token_id if generation is None else generation.eos_token_id
    tokens = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(token, int) and not isinstance(token, bool) and 0 <= token < MOST_IDS for token in tokens):
        raise ModelError(f"{name} has eos_token_id={shortened(found)}, which is no token's number; repair its configs")
    return found


def load_base(
    name: str,
    config: PretrainedConfig,
    topology: Topology,
    *,
    dtype: torch.dtype,
    attention: str,
    trust_remote_code: bool = False,
    revision: str | None = None,
    quantization: str = Quantisation.NONE,
) -> PreTrainedModel:
    """The frozen base in ``dtype``; under ZeRO-3 every rank holds only its shard from the beginning, else the whole on
    its own device. With ``quantization`` its linear layers are quantised one by one while it is loaded."""
    chosen, kind = attention_of(config, attention, topology), Quantisation(quantization)
    given: PreTrainedModel | None = given_object(MODEL, name)
    with agreement("loading"):
        if given is None:
            refuse_larger(name, config)
        stored = given is None and check_stored(name, config, kind)
        if kind != Quantisation.NONE:
            require_kernels(kind, topology.device)
    source: Any = AutoModelForCausalLM if given is None else type(given)
    options = {"trust_remote_code": trust_remote_code, "revision": revision or MAIN}
    with attention_explained(config, attention), loading_weights(name, topology, dtype, kind, revision):
        base, found = source.from_pretrained(
            name if given is None else None,
            config=plain_config(config) if stored else config,
            dtype=dtype,
            attn_implementation=chosen,
            output_loading_info=True,
            **(options if given is None else {"state_dict": weights_of(given)}),
            **straight_to_device(topology),
            **quantised_while_loading(topology, kind, kept_whole(config) if stored else None),
        )
    require_all_weights(name, found)
    if given is not None:
        take_over(given, base, shards=shards_while_loading(topology))
    return cast(PreTrainedModel, base)


def attention_of(config: PretrainedConfig, attention: str, topology: Topology) -> str:
    """transformers' name of the attention that ``model.attention`` stands for here. ModelError where it cannot be."""
    if attention == "sdpa" and config_value(config.get_text_config(), "attn_logit_softcapping") is not None:
        raise ModelError(
            f"{config.model_type} does not run with model.attention=sdpa (it caps attention's scores); set it to eager"
        )
    on_cpu = topology.device.type == "cpu" and config.model_type not in OWN_ATTENTION
    ours = attention == "sdpa" and (on_cpu or config.model_type in PACKABLE)
    return ROLE_ATTENTION if ours else attention


@contextmanager
def attention_explained(config: PretrainedConfig, attention: str) -> Iterator[None]:
    """Around ``loading_weights``: a model that does not run with this attention, as a ModelError that says so."""
    try:
        yield
    except ModelError as error:
        cause = error.__cause__
        if not isinstance(cause, (ValueError, ImportError)) or "attention" not in str(cause):
            raise
        raise ModelError(
            f"{config.model_type} does not run with model.attention={attention} ({described(cause)}); set it to eager"
        ) from cause


def refuse_larger(name: str, config: PretrainedConfig) -> None:
    """Raise ModelError where one matrix that ``config`` describes has far more numbers than the files of the local
    folder ``name`` can hold: transformers would make it up, and fill the machine's memory before it says so."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return
    files = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")]
    held = sum(path.stat().st_size for path in files if path.is_file())  # which a link to itself is not
    text, sides = config.get_text_config(), ["vocab_size", "hidden_size", "intermediate_size"]
    if getattr(text, "rope_parameters", None) is None:  # positions may be learned
        sides.append("max_position_embeddings")
    hidden = config_value(text, "hidden_size")
    for side in sides:
        size = config_value(text, side)
        if not all(isinstance(each, int) for each in (hidden, size)):
            continue  # None, or one for each layer
        # Projections may be a fraction of hidden_size squared, where heads share keys or weights are factored.
        if hidden * size // (16 if side == "hidden_size" else 1) > MOST_PER_BYTE * held + SMALL:
            raise ModelError(
                f"{name} has a config.json of {side}={size} and hidden_size={hidden}, but files of {held} bytes; fetch "
                "the model again"
            )


def require_all_weights(name: str, found: Mapping[str, Any]) -> None:
    """Raise ModelError where transformers, as ``found`` says, has made up weights that the model's files lack, or has
    left one aside that did not fit: it would only warn."""
    missing = sorted([*found["missing_keys"], *(each[0] for each in found.get("mismatched_keys", ()))])
    if missing:
        raise ModelError(
            f"the files of {name} lack {missing[0]}, one of {len(missing)} weights that its config asks for; fetch the "
            "model again"
        )


def quantised_while_loading(
    topology: Topology, kind: Quantisation, stored_but: Sequence[str] | None = None
) -> dict[str, Any]:
    """What has ``from_pretrained`` quantise each tensor as it comes, and shard it where ZeRO-3 runs. ``stored_but``:
    the files have the bytes already, but for these layers."""
    if kind == Quantisation.NONE:
        return {}
    sharding = partial(shard, topology) if shards_while_loading(topology) else None
    return {"quantization_config": QuantisedLoading(kind, topology.device, sharding, stored_but)}


@contextmanager
def loading_weights(
    name: str,
    topology: Topology,
    dtype: torch.dtype,
    kind: Quantisation = Quantisation.NONE,
    revision: str | None = None,
) -> Iterator[None]:
    """Around the loading of a model's weights, sharded where ZeRO-3 runs. That is then a collective itself, in which a
    rank cannot tell the others of a failure; so what may be missing on one machine is looked for before. Without shards
    what one rank fails with, all raise."""
    sharded = shards_while_loading(topology)
    if sharded:
        with agreement("loading"):
            check_weights_are_here(name)
    # What is quantised its quantiser shards.
    sharding = sharded_loading(topology, dtype) if kind == Quantisation.NONE else nullcontext()
    with nullcontext() if sharded else agreement("loading"), explained(name, revision), sharding:
        yield


def straight_to_device(topology: Topology) -> dict[str, Any]:
    """What has ``from_pretrained`` read each tensor from the mapped file to this process's GPU. Without it a process
    would first build the whole model in host memory: four processes, four copies. Under ZeRO-3 loading shards instead;
    on a CPU there is nowhere to go."""
    direct = topology.device.type != "cpu" and topology.launch.zero_stage != 3
    return {"device_map": {"": topology.device}} if direct else {}


def lora_config(
    *,
    rank: int,
    alpha: int,
    rslora: bool,
    target_modules: str | Sequence[str],
    exclude_modules: Sequence[str],
    revision: str | None = None,
    start: str = PEFTS_START,
) -> LoraConfig:
    """PEFT's settings for one role, which name the ``revision`` of the base, and whose A starts as ``start`` says.
    ``all-linear`` is spelt out by ``targets.spelt_out``. Raises ModelError for a pattern that might take long to
    match."""
    if isinstance(target_modules, str):
        steps("the experiment", "model.target_modules", target_modules)
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        use_rslora=rslora,
        init_lora_weights=True if start == PEFTS_START else cast(Any, start),
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        exclude_modules=list(exclude_modules) or None,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        revision=revision,
    )


def build_ppo_roles(
    base: PreTrainedModel,
    adapter: LoraConfig,
    *,
    policy_adapter: str | None,
    reference_adapter: str | None = None,
    value_adapter: str | None = None,
    reward_adapter: str | None = None,
    value_on: str = ON_ADAPTER,
    **options: Any,
) -> SharedBase:
    """Policy and value on ``base``, and a frozen reward where a folder is given.

    With ``policy_adapter`` the policy starts from that LoRA folder. The reference is ``reference_adapter``, frozen, in
    training the same folder, or without one the bare base. With ``value_adapter`` the value starts from a reward
    adapter and its head: at the last token its value is that score.
    Adapters may differ in rank and in the layers they adapt. ``options`` go to SharedBase.
    """
    at = adapter.revision
    adapters = {
        POLICY: adapter if policy_adapter is None else adapter_config(policy_adapter, "model.policy_adapter", at)
    }
    if reference_adapter is not None:
        adapters[REFERENCE] = adapter_config(reference_adapter, "model.policy_adapter", at)
    if value_on == ON_ADAPTER:
        start = None if value_adapter is None else adapter_config(value_adapter, "model.value_adapter", at)
        adapters[VALUE] = start or adapter
    if reward_adapter is not None:
        adapters[REWARD] = adapter_config(reward_adapter, "reward.adapter", at)
    shared = SharedBase(base, adapters, value_on=value_on, **options)
    folders = {POLICY: policy_adapter, REFERENCE: reference_adapter, VALUE: value_adapter, REWARD: reward_adapter}
    for role, folder in folders.items():
        if role in adapters and folder is not None:
            shared.load_role(role, folder)
            if role in SCALAR_ROLES:
                shared.load_head(role, Path(folder) / REWARD_HEAD)
    return shared


def adapter_config(folder: str, setting: str, revision: str | None = None) -> LoraConfig:
    """The settings of a LoRA folder to start from, with dropout off and the ``revision`` of the base it is put on."""
    if not (Path(folder) / "adapter_config.json").is_file():
        raise ModelError(f"{setting}={folder} has no adapter_config.json; give the folder of a PEFT LoRA adapter")
    check_model_folder(folder)
    config = read_lora_config(folder)
    config.lora_dropout, config.inference_mode, config.revision = 0.0, False, revision
    return config


class explained:
    """Turns what transformers raises about a model's files into one line: they may hold anything, and it may raise
    whatever it likes. A full disk, a lack of memory and the toolkit's own errors pass."""

    def __init__(self, name: str, revision: str | None = None) -> None:
        self.name, self.shown = name, repr(name) if revision is None else f"{name!r} (revision {revision!r})"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if DISK_FULL in str(error):
            return
        if isinstance(error, OSError):
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            # Names of the hub have one slash at most.
            only_a_path = self.name.startswith((".", "/", "~")) or self.name.count("/") > 1
            if only_a_path and not Path(self.name).exists():
                first = "there is no such folder"  # transformers would say that it is no name of the hub
            raise ModelError(
                f"cannot load the model {self.shown}: {first}; give a hub name or a local folder"
            ) from error
        if isinstance(error, Exception) and not isinstance(error, (RLHFError, MemoryError, torch.OutOfMemoryError)):
            raise ModelError(
                f"cannot load the model {self.shown} ({described(error)}); fetch it again, or use another"
            ) from error
