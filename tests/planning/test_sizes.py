"""What the planner reads from models, against the models: shapes of weights, tensors of a cache, tensors of a pass."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedConfig,
    Qwen2Config,
)

from rlhf_toolkit.distributed.topology import Topology
from rlhf_toolkit.errors import ConfigError, ModelError
from rlhf_toolkit.models.recurrent import TRIED, layer_memory, read_themselves
from rlhf_toolkit.models.renamed import cache_argument
from rlhf_toolkit.models.reward_model import load_reward_model
from rlhf_toolkit.planning.memory import STREAM, WINDOW, place
from rlhf_toolkit.planning.sizes import kept_bytes
from rlhf_toolkit.rollout.decoding import SPARE_COLUMNS, most_columns
from rlhf_toolkit.rollout.sizes import (
    RolloutSize,
    dimensions,
    latent_width,
    model_size,
    needs_of,
    reward_bytes,
    sharding,
)
from rlhf_toolkit.types import Prompt
from tests.models.test_architectures import WORKS, Case
from tests.support.builders import tiny_tokenizer
from tests.support.launch import ROOT, run_worker
from tests.support.offenders import for_each
from tests.support.roles import tiny_shared
from tests.support.tiny import WORDS

sys.path.insert(0, str(ROOT / "bench"))

from phases import LiveTensors
from placements import CARD, COMMUNICATOR, CONTEXT, size_of

OUT = ("o_proj", "out_proj", "dense", "c_proj")
"""What gives attention's output."""
DOWN = ("down_proj", "c_proj", "fc_out", "fc2", "dense_4h_to_h", "w2")
"""What gives an MLP's output."""


WITHOUT_ATTENTION = ("mamba", "mamba2", "falcon_mamba")


def of_weights(model: nn.Module, hidden: int) -> dict[str, int]:
    """Layers, queries and the MLP's width, from the shapes of the largest stack of layers."""
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))
    queries, widths = set(), []
    for layer in layers:
        modules: list[Any] = list(layer.modules())
        chosen = next((int(module.top_k) for module in modules if hasattr(module, "top_k")), 0)
        width, latent = 0, any("kv_b_proj" in name for name, _ in layer.named_parameters())
        for name, p in layer.named_parameters():
            parent, last = name.removesuffix(".weight").rpartition(".")[::2]
            if p.dim() == 3 and last == "down_proj":
                width += chosen * p.numel() // len(p) // hidden
            elif p.dim() == 2 and "attn" not in parent and "attention" not in parent and last in DOWN:
                width += p.numel() // hidden
            elif latent and last in ("q_b_proj", "q_proj"):  # keys are wider than values there
                queries.add(len(p))
            elif p.dim() == 2 and ("attn" in parent or "attention" in parent) and last in OUT:
                queries.add(p.numel() // hidden)
        widths.append(width)
    return {"layers": len(layers), "queries": max(queries), "intermediate": max(widths)}


def of_scores(model: Any) -> int:
    """Heads, from attention's scores (B, heads, T, T)."""
    with torch.no_grad():
        scores = model(input_ids=torch.ones(1, 3, dtype=torch.long), output_attentions=True).attentions
    return int(scores[-1].shape[1])


def built(case: Case) -> Any:
    config = CONFIG_MAPPING[case.model_type](**case.sizes)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def test_layers_heads_and_widths_are_those_of_the_model() -> None:
    wrong = {}
    for name in sorted(WORKS.keys() - WITHOUT_ATTENTION - {"nemotron_h", "granitemoehybrid, dense"}):
        model, hidden = built(WORKS[name]), 32
        right = of_weights(model, hidden)
        right |= {"heads": of_scores(model), "hidden": hidden}
        found = dimensions(model.config)
        size = vars(model_size(tiny_shared(model), 1, on_cpu=True))
        differing = {key: (found[key], size[key], number) for key, number in right.items() if found[key] != number}
        if differing or any(size[key] != found[key] for key in found):
            wrong[name] = differing
    assert wrong == {}


@for_each("name", WITHOUT_ATTENTION)
def test_a_model_without_attention_has_neither_queries_nor_keys(name: str) -> None:
    found = dimensions(built(WORKS[name]).config)
    assert found.pop("intermediate") >= 64  # two times 32, or what a config that says nothing is taken for
    assert found == {"layers": 2, "hidden": 32, "queries": 0, "keys": 0, "heads": 1}


@for_each("name", ["qwen3_5", "kimi_linear", "bamba", "falcon_h1", "jamba"])
def test_a_recurrence_takes_what_a_pass_over_it_allocates(name: str) -> None:
    """What is measured without memory against a real pass of one layer: its peak, and what backward needs of it."""
    model = built(WORKS[name]).requires_grad_(False)
    layer = next(module for module in model.modules() if read_themselves(module))
    x = torch.randn(1, TRIED, 32)
    found = layer_memory(model)
    with LiveTensors() as live, torch.no_grad():
        layer(x)
    assert found.layers == sum(bool(read_themselves(module)) for module in model.modules())
    peak = live.peaks["start"] - x.nbytes - sum(p.nbytes for p in layer.parameters())
    assert 0.95 * found.scratch < peak / TRIED < 1.05 * found.scratch
    assert found.kept > found.scratch / 2


def test_a_step_of_latent_attention_spreads_out_what_is_cached() -> None:
    """What one layer allocates a column where one token reads all of them, against what a slot is taken to need."""
    model = built(WORKS["deepseek_v2"]).requires_grad_(False)
    cache: Any = DynamicCache(config=model.config)
    columns = 2048
    one = torch.ones(1, 1, dtype=torch.long)
    with torch.no_grad():
        model(input_ids=one, use_cache=True, **{str(cache_argument(model)): cache})
        for each in cache.layers:
            each.keys, each.values = (held.repeat(1, 1, columns, 1) for held in (each.keys, each.values))
        held = sum(part.nbytes for each in cache.layers for part in (each.keys, each.values))
        with LiveTensors() as live:
            model(input_ids=one, use_cache=True, **{str(cache_argument(model)): cache})
    found = 4 * latent_width(model.config)
    assert found == 4 * (6 + 10 + 8) * 4 and latent_width(built(WORKS["llama"]).config) == 0
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert 0.9 * found < (live.peaks["start"] - weights - held) / columns < 1.1 * found


def test_what_no_config_says_is_asked_for() -> None:
    with pytest.raises(ModelError, match="PreTrainedConfig has no hidden_size"):
        dimensions(PreTrainedConfig())


@pytest.mark.parametrize("later_turns", [False, True])
def test_a_slot_has_the_columns_that_decoding_allocates(later_turns: bool) -> None:
    """Of all that a later turn's rows may have grown to, decoding never needs more than in the first."""
    size = RolloutSize(8, 1200, role_pass_tokens=1, longest_prompt=200, later_turns=later_turns)
    grown = (0, 300, 999) if later_turns else (0,)
    prompts = [Prompt(i, "", (1,) * (200 + more), {}) for i, more in enumerate(grown)]
    allocated = most_columns(prompts, [1000 - more for more in grown]) + SPARE_COLUMNS
    assert size.slot_columns == allocated == 1232
    assert size.widest_prompt == (1200 if later_turns else 200)


# ---- a reward model --------------------------------------------------------------------------------------------------


def classifier(config: LlamaConfig, *, sharded: bool, device: str = "cpu") -> Any:
    """A reward model; ``sharded`` as ZeRO-3 leaves it between two uses."""
    config.num_labels, config.use_cache, config.pad_token_id = 1, False, 0
    with torch.device(device):
        model = LlamaForSequenceClassification._from_config(config, dtype=torch.bfloat16)
    for p in model.parameters() if sharded else ():
        p.ds_id, p.ds_numel, p.ds_status = 0, p.numel(), ZeroParamStatus.NOT_AVAILABLE
        p.data = torch.empty(0, dtype=p.dtype, device=device)
    return model


def scored(topology: Topology, name: str) -> tuple[int, int]:
    """Bytes of tensors at the peak of scores of a full batch, beside what lay there before, and those expected."""
    model = load_reward_model(name, topology, dtype=torch.bfloat16, trust_remote_code=False)
    text, rows = "w1 " * 63, 8192 // 64
    with LiveTensors() as live:
        for p in model.model.parameters():
            getattr(p, "ds_tensor", p).view(-1)  # seen before the pass
        held = live.now
        model.scores([Prompt(i, text, (1,), {}) for i in range(rows)], ["w2"] * rows)
    return max(live.peaks.values()) - held, reward_bytes(model.model, 64, on_cpu=False)


def test_a_reward_model_takes_its_pass_and_under_zero3_all_of_itself_beside_its_shard(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "num_labels": 1,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
    config = LlamaConfig(vocab_size=64, num_hidden_layers=12, pad_token_id=0, **sizes)
    model: Any = LlamaForSequenceClassification(config)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tiny_tokenizer(words=WORDS, pad="</s>").save_pretrained(tmp_path / "model")
    expected = []
    for stage in (2, 3):
        (folder := tmp_path / str(stage)).mkdir()
        ranks = run_worker("tests.planning.test_sizes:scored", folder, stage=stage, name=str(tmp_path / "model"))
        assert all(0.95 <= estimate / peak <= 1.10 for peak, estimate in ranks), ranks
        expected.append(ranks[0][1])
    assert expected[1] - expected[0] == sum(p.nbytes for p in model.parameters())


def test_a_row_longer_than_a_batch_is_a_pass_of_its_own() -> None:
    model = classifier(LlamaConfig(**WORKS["llama"].sizes), sharded=False)
    short, long = (reward_bytes(model, columns, on_cpu=False) for columns in (64, 2 * 8192))
    assert long == 2 * short


def qwen7b() -> Qwen2Config:
    return Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    )


@pytest.fixture(scope="module")
def policy() -> Any:
    return size_of(qwen7b())


EIGHT = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
ONE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}


@pytest.mark.parametrize(
    ("shape", "cards", "chosen"), [(None, 4, WINDOW), (ONE, 4, STREAM), (EIGHT, 4, "refused"), (EIGHT, 8, "refused")]
)
def test_7b_with_a_reward_model_on_cards_of_24_gb(policy: Any, shape: Any, cards: int, chosen: str) -> None:
    """An 8B reward model is 15 GiB whole, on every card beside its shard, the base's shard and what streaming keeps."""
    size = RolloutSize(128 // cards, 896, 4096, 512, update_tokens=4096, checkpointing=True, packing=True)
    free = CARD - CONTEXT - COMMUNICATOR
    if shape is not None:
        config = LlamaConfig(vocab_size=128256, num_key_value_heads=8, **shape)
        model = classifier(config, sharded=True, device="meta")
        free -= sum(p.ds_numel for p in model.parameters()) * 2 // cards
        size = RolloutSize(**{**vars(size), "reward_bytes": reward_bytes(model, 896, on_cpu=False)})
    how = sharding(policy, ranks=cards, stage=3, on_cpu=False)
    free -= kept_bytes(policy, how, moments=False)
    options: dict[str, Any] = {"free": free, "rows": size.rows, "mode": "auto", "slots": None}
    if chosen == "refused":
        with pytest.raises(ConfigError, match=r"reward\.model alone needs"):
            place(needs_of(policy, how, size, "exact"), **options)
        return
    assert place(needs_of(policy, how, size, "exact"), **options).mode == chosen


# ---- an optimizer in the machine's memory ----------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [2, 3])
def test_an_offloaded_optimizer_leaves_nothing_on_the_card(policy: Any, stage: int) -> None:
    """Its float32 copy, the gradients it takes and two moments: a share of each."""
    here, away = (sharding(policy, ranks=2, stage=stage, on_cpu=False, offloaded=each) for each in (False, True))
    share = -(-4 * policy.trained // 2)
    in_kept = {2: 1, 3: 2}[stage]  # ZeRO-2 makes its gradients in the update
    for moments, parts in ((False, in_kept), (True, in_kept + 2)):
        kept = [kept_bytes(policy, how, moments=moments) for how in (here, away)]
        assert kept[0] - kept[1] == parts * share
    nothing: Any = RolloutSize(1, 1, 1, 1, update_tokens=2)
    update = [needs_of(policy, how, nothing, "exact").update_bytes for how in (here, away)]
    assert update[0] - update[1] == (share if stage == 2 else 0)


def test_on_a_cpu_there_is_one_memory(policy: Any) -> None:
    how = {each: sharding(policy, ranks=2, stage=3, on_cpu=True, offloaded=each) for each in (False, True)}
    assert how[True] == how[False]


def test_moments_in_8_bits_take_a_quarter_and_their_blocks_magnitudes(policy: Any) -> None:
    for stage in (0, 2, 3):
        how = [sharding(policy, ranks=2, stage=stage, on_cpu=False, eight_bit=each) for each in (False, True)]
        plain, small = (kept_bytes(policy, each) - kept_bytes(policy, each, moments=False) for each in how)
        share = policy.trained if stage == 0 else -(-policy.trained // 2)
        assert plain - small == pytest.approx(2 * share * (4 - 1 - 4 / 256), abs=4)
