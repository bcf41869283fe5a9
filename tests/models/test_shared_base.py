"""What each role says and where it is read, what trains, and what is written to disk and found again."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from rlhf_toolkit.errors import CheckpointError, ModelError
from rlhf_toolkit.models.loading import build_ppo_roles
from rlhf_toolkit.models.shared_base import SharedBase
from tests.support.offenders import for_each
from tests.support.roles import lora, plain_peft, rows_of, sequences_and_mask, tiny_shared
from tests.support.tiny import tiny_llama
from tests.support.values import there

ALL = ("policy", "value", "reference", "reward")
SUBSETS = [subset for size in range(1, 5) for subset in combinations(ALL, size)]
LENGTHS = ((2, 4, 1), (5, 1, 3))
TEMPERATURE = 0.7


def of_roles(*roles: str) -> set[str]:
    """The names of what ``roles`` say."""
    names = {
        "policy": ("policy_logprobs", "policy_entropies"),
        "reference": ("reference_logprobs",),
        "value": ("token_values", "final_values"),
        "reward": ("reward_scores",),
    }
    return {name for role in roles for name in names[role]}


def close(found: Tensor, right: Tensor | list[float]) -> None:
    torch.testing.assert_close(found, torch.as_tensor(right), rtol=1e-5, atol=1e-5)


def positions(prompt: int, response: int) -> range:
    """The columns of a row's response tokens."""
    return range(prompt, prompt + response)


# ---- what is read where ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["policy", "reference"])
def test_log_probs_and_entropies_are_those_of_full_logits(role: str) -> None:
    """A loop over response tokens: the token's log-prob under the logits of everything before it."""
    shared, (ids, mask) = tiny_shared(), sequences_and_mask(*LENGTHS)
    model = plain_peft(shared, "policy", tiny_llama()) if role == "policy" else tiny_llama().eval()
    with torch.no_grad():
        out = shared(rows_of(ids, mask), roles=("value", role), temperature=TEMPERATURE)
        logprobs, entropies = [], []
        for row, prompt, response in zip(ids, *LENGTHS, strict=True):
            for t in positions(prompt, response):
                logp = (model(input_ids=row[None, :t]).logits[0, -1] / TEMPERATURE).log_softmax(-1)
                logprobs.append(logp[row[t]].item())
                entropies.append(-(logp.exp() * logp).sum().item())
    close(out[f"{role}_logprobs"], logprobs)
    if role == "policy":  # nobody asks for the reference's
        close(out.policy_entropies, entropies)


def test_values_are_read_before_each_token_and_after_the_last() -> None:
    shared, (ids, mask) = tiny_shared(), sequences_and_mask(*LENGTHS)
    model, head = plain_peft(shared, "value", tiny_llama()), shared.scalar_heads["value"]
    with torch.no_grad():
        out = shared(rows_of(ids, mask), roles=("policy", "value"))
        values, final = [], []
        for row, prompt, response in zip(ids, *LENGTHS, strict=True):
            for t in (*positions(prompt, response), prompt + response):
                state = model.base_model.model.model(input_ids=row[None, :t]).last_hidden_state[0, -1]
                values.append((state @ head.weight + head.bias).item())
            final.append(values.pop())
    close(out.token_values, values)
    close(out.final_values, final)


def test_reward_scores_are_read_at_the_last_response_token() -> None:
    shared, (ids, mask) = tiny_shared(roles=("policy", "value", "reward")), sequences_and_mask(*LENGTHS)
    model, head = plain_peft(shared, "reward", tiny_llama()), shared.scalar_heads["reward"]
    with torch.no_grad():
        out = shared(rows_of(ids, mask), roles=("reward",))
        ends = [p + r for p, r in zip(*LENGTHS, strict=True)]
        states = [
            model.base_model.model.model(input_ids=row[None, :end]).last_hidden_state[0, -1]
            for row, end in zip(ids, ends, strict=True)
        ]
        close(out.reward_scores, [(state @ head.weight + head.bias).item() for state in states])


@for_each("roles", SUBSETS, ids="-".join)
def test_any_roles_together_say_what_each_says_alone(roles: tuple[str, ...]) -> None:
    shared, (ids, mask) = tiny_shared(roles=("policy", "value", "reward")), sequences_and_mask(*LENGTHS)
    with torch.no_grad():
        alone = {name: out for role in ALL for name, out in shared(rows_of(ids, mask), roles=(role,)).items()}
        for order in (roles, roles[::-1]):
            together = shared(rows_of(ids, mask), roles=order)
            assert together.keys() == of_roles(*roles)
            for name, found in together.items():
                assert found.dtype == torch.float32
                assert found.shape == ((len(ids),) if name in ("final_values", "reward_scores") else (mask.sum(),))
                close(found, alone[name])


def test_padding_and_its_token_change_nothing() -> None:
    shared, (ids, mask) = tiny_shared(roles=("policy", "value", "reward")), sequences_and_mask(*LENGTHS)
    wider, real = torch.full((len(ids), ids.shape[1] + 3), 9), ids > 1  # the builder pads with 1
    wider[:, : ids.shape[1]][real] = ids[real]
    with torch.no_grad():
        expected = shared(rows_of(ids, mask), roles=ALL)
        found = shared(rows_of(wider, torch.nn.functional.pad(mask, (0, 3))), roles=ALL)
    for name in expected:
        close(found[name], expected[name])


def test_a_trunk_that_ends_narrower_than_its_hidden_size() -> None:
    """OPT-350m projects its states down before the output layer; the value head stands there too."""
    config: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    base = OPTForCausalLM(OPTConfig(**config, word_embed_proj_dim=16, do_layer_norm_before=False, dropout=0.0))
    shared, (ids, mask) = tiny_shared(base), sequences_and_mask(*LENGTHS)
    out = shared(rows_of(ids, mask), roles=("policy", "value"))
    assert shared.scalar_heads["value"].weight.shape == (16,) and out.token_values.shape == (mask.sum(),)


# ---- what trains -----------------------------------------------------------------------------------------------------


def fingerprint(shared: SharedBase) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in shared.named_parameters()}


def test_policy_and_value_train_and_nothing_else() -> None:
    shared = tiny_shared(roles=ALL)
    trained = {name for name, trains in fingerprint(shared).items() if trains}
    adapters = {
        name for name, _ in shared.named_parameters() if "lora_" in name and name.split(".")[-2] in ("policy", "value")
    }
    assert trained == adapters | {"scalar_heads.value.weight", "scalar_heads.value.bias"}
    assert len(adapters) == 2 * 2 * 2 * 7  # A and B, two roles, two layers, seven linears


def test_nothing_changes_what_trains(tmp_path: Path) -> None:
    shared, (ids, mask) = tiny_shared(roles=ALL), sequences_and_mask(*LENGTHS)
    before = fingerprint(shared)
    for roles in SUBSETS:
        shared(rows_of(ids, mask), roles=roles)
        with torch.no_grad():
            shared.eval()(rows_of(ids, mask), roles=roles)
        shared.train()
    assert fingerprint(shared) == before
    shared.save_pretrained(tmp_path)
    assert fingerprint(shared) == before
    shared.load_trained(tmp_path)
    assert fingerprint(shared) == before


def test_names_of_parameter_groups_are_plain_text() -> None:
    """Optimizers save them, and torch reads no other types back."""
    assert {type(name) for name in tiny_shared().parameter_groups()} == {str}


def test_parameter_groups_hold_each_trained_parameter_once() -> None:
    shared = tiny_shared(roles=ALL)
    groups = shared.parameter_groups()
    assert list(groups) == ["policy", "value", "value_head"]
    grouped = [id(p) for group in groups.values() for p in group]
    assert sorted(grouped) == sorted(id(p) for p in shared.parameters() if p.requires_grad)
    names = {id(p): name for name, p in shared.named_parameters()}
    assert all(".policy." in names[id(p)] for p in groups["policy"])
    assert all("lora_" in names[id(p)] and ".value." in names[id(p)] for p in groups["value"])
    assert [tuple(p.shape) for p in groups["value_head"]] == [(32,), (1,)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_joint_forward_gives_every_trained_parameter_a_gradient(checkpointing: bool) -> None:
    shared, (ids, mask) = tiny_shared(gradient_checkpointing=checkpointing).train(), sequences_and_mask(*LENGTHS)
    out = shared(rows_of(ids, mask), roles=("policy", "value"))
    (out.policy_logprobs.sum() + out.token_values.square().sum()).backward()
    for name, p in shared.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) if p.requires_grad else p.grad is None, name


@pytest.mark.parametrize(
    ("said", "moved", "still"),
    [("policy_logprobs", {"policy"}, {"value"}), ("token_values", {"value", "value_head"}, {"policy"})],
)
def test_a_loss_of_one_role_moves_that_role_alone(said: str, moved: set[str], still: set[str]) -> None:
    """The other's gradient is there and exactly zero: ZeRO-3 would take a missing one for the last step's."""
    shared, (ids, mask) = tiny_shared(), sequences_and_mask(*LENGTHS)
    shared(rows_of(ids, mask), roles=("policy", "value"))[said].square().sum().backward()
    groups = shared.parameter_groups()
    assert all(p.grad is not None and bool(p.grad.any()) for name in moved for p in groups[name])
    assert all(p.grad is not None and not bool(p.grad.any()) for name in still for p in groups[name])


def test_without_entropy_gradient_entropies_carry_none() -> None:
    shared, (ids, mask) = tiny_shared(), sequences_and_mask(*LENGTHS)
    assert not shared(rows_of(ids, mask), roles=("policy",)).policy_entropies.requires_grad
    assert shared(rows_of(ids, mask), roles=("policy",), entropy_gradient=True).policy_entropies.requires_grad


# ---- a value on the policy's trunk -----------------------------------------------------------------------------------


def borrowing(**options: Any) -> SharedBase:
    return tiny_shared(roles=("policy",), value_on="policy_trunk", **options)


@pytest.mark.parametrize("roles", [("policy", "value"), ("value",), ("value", "reference", "policy")], ids="-".join)
def test_a_borrowing_value_reads_the_policys_states(roles: tuple[str, ...]) -> None:
    """In plain PEFT: the policy's trunk, cut off, under one linear layer."""
    shared, (ids, mask) = borrowing(), sequences_and_mask(*LENGTHS)
    model, head = plain_peft(shared, "policy", tiny_llama()), shared.scalar_heads["value"]
    with torch.no_grad():
        out = shared(rows_of(ids, mask), roles=roles)
        values, final = [], []
        for row, prompt, response in zip(ids, *LENGTHS, strict=True):
            states = model.base_model.model.model(input_ids=row[None, : prompt + response]).last_hidden_state[0]
            said = (states @ head.weight + head.bias).tolist()
            values += said[prompt - 1 : -1]
            final.append(said[-1])
    assert out.keys() == of_roles(*roles)
    close(out.token_values, values)
    close(out.final_values, final)


def test_a_borrowing_value_costs_no_rows() -> None:
    shared, (ids, mask) = borrowing(), sequences_and_mask(*LENGTHS)
    seen: list[int] = []
    shared.causal_lm.base_model.register_forward_hook(lambda module, args, out: seen.append(len(out[0])))
    for roles, rows in ((("policy", "value"), 3), (("value",), 3), (("policy", "value", "reference"), 6)):
        shared(rows_of(ids, mask), roles=roles)
        assert seen.pop() == rows


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_of_a_borrowing_value_moves_its_head_alone(checkpointing: bool) -> None:
    """Not nearly: the policy's gradient has the same bits with the value's loss and without, and the head's is that of
    a linear layer on constant states."""
    (ids, mask), gradients = sequences_and_mask(*LENGTHS), []
    for value_coef in (0.0, 100.0):
        shared = borrowing(gradient_checkpointing=checkpointing).train()
        out = shared(rows_of(ids, mask), roles=("policy", "value"))
        (out.policy_logprobs.sum() + value_coef * out.token_values.square().sum()).backward()
        gradients.append({name: there(p.grad) for name, p in shared.named_parameters() if p.requires_grad})
    without, with_value = gradients
    for name, gradient in with_value.items():
        assert gradient.any(), name
        assert torch.equal(gradient, without[name]) == name.startswith("base_model"), name
    states = []
    shared.scalar_heads["value"].register_forward_hook(lambda module, args, out: states.append(args[0]))
    values = shared(rows_of(ids, mask), roles=("value",)).token_values
    assert not any(state.requires_grad for state in states)
    close(with_value["scalar_heads.value.weight"], 200 * values.detach() @ states[0])
    close(with_value["scalar_heads.value.bias"], 200 * values.detach().sum()[None])


def test_a_borrowing_value_has_no_adapter_on_disk_nor_in_the_optimizer(tmp_path: Path) -> None:
    saved, fresh = borrowing(seed=1), borrowing(seed=2)
    assert list(saved.parameter_groups()) == ["policy", "value_head"]
    saved.save_pretrained(tmp_path)
    assert [path.name for path in (tmp_path / "value").iterdir()] == ["value_head.safetensors"]
    fresh.load_trained(tmp_path)
    for name, p in saved.named_parameters():
        assert not p.requires_grad or torch.equal(p, fresh.get_parameter(name)), name


def test_it_may_start_from_an_adapter_too(tmp_path: Path) -> None:
    get_peft_model(tiny_llama(), lora()).save_pretrained(str(tmp_path))
    shared = build_ppo_roles(
        tiny_llama(), lora(), policy_adapter=str(tmp_path), reference_adapter=str(tmp_path), value_on="policy_trunk"
    )
    assert set(shared.peft_config) == {"policy", "reference"} and set(shared.scalar_heads) == {"value"}


# ---- disk ------------------------------------------------------------------------------------------------------------


def test_plain_peft_loads_the_policy_and_says_the_same(tmp_path: Path) -> None:
    """Show 6."""
    shared, (ids, mask) = tiny_shared(), sequences_and_mask(*LENGTHS)
    shared.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "policy").eval()
    with torch.no_grad():
        logp = model(input_ids=ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
        close(shared(rows_of(ids, mask), roles=("policy", "value")).policy_logprobs, logp[mask[:, 1:]])
        merged = model.merge_and_unload()(input_ids=ids).logits.log_softmax(-1)[:, :-1]
    close(merged.gather(-1, ids[:, 1:, None]).squeeze(-1)[mask[:, 1:]], logp[mask[:, 1:]])


def test_only_trained_roles_are_written(tmp_path: Path) -> None:
    tiny_shared(roles=ALL).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"policy", "value"}
    assert {path.name for path in (tmp_path / "value").iterdir()} >= {
        "adapter_model.safetensors",
        "value_head.safetensors",
    }
    assert not (tmp_path / "policy" / "value_head.safetensors").exists()


def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    saved, fresh = tiny_shared(seed=1), tiny_shared(seed=2)
    trained = [name for name, p in saved.named_parameters() if p.requires_grad]
    assert not any(torch.equal(saved.get_parameter(name), fresh.get_parameter(name)) for name in trained)
    saved.save_pretrained(tmp_path)
    fresh.load_trained(tmp_path)
    for name in trained:
        assert torch.equal(saved.get_parameter(name), fresh.get_parameter(name)), name


def test_loading_leaves_the_other_roles_alone(tmp_path: Path) -> None:
    saved, fresh, same = (tiny_shared(roles=ALL, seed=seed) for seed in (1, 2, 2))
    saved.save_pretrained(tmp_path)
    fresh.load_role("policy", tmp_path / "policy")
    for name, p in fresh.named_parameters():
        changed = "lora_" in name and ".policy." in name
        assert torch.equal(p, same.get_parameter(name)) != changed, name


def test_gathered_tensors_are_saved_instead_of_ones_own(tmp_path: Path) -> None:
    """Under ZeRO-3 the engine hands over whole tensors and the module's own are empty."""
    shared = tiny_shared()
    state = {name: tensor + 1 for name, tensor in shared.state_dict().items()}
    shared.save_pretrained(tmp_path, state_dict=state)
    head = load_file(tmp_path / "value" / "value_head.safetensors")
    assert torch.equal(head["weight"], shared.get_parameter("scalar_heads.value.weight") + 1)
    adapter = load_file(tmp_path / "policy" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A"
    assert torch.equal(adapter[f"{name}.weight"], shared.get_parameter(f"{name}.policy.weight") + 1)


@pytest.mark.parametrize(
    "name", ["scalar_heads.value.weight", "base_model.model.model.layers.1.mlp.up_proj.lora_B.value.weight"]
)
def test_an_empty_tensor_is_never_written(tmp_path: Path, name: str) -> None:
    shared = tiny_shared()
    state = {**shared.state_dict(), name: torch.empty(0)}
    with pytest.raises(CheckpointError, match=f"1 tensors are empty, first {name}"):
        shared.save_pretrained(tmp_path, state_dict=state)
    assert not list(tmp_path.iterdir())


def test_a_foreign_adapter_is_refused(tmp_path: Path) -> None:
    shared = tiny_shared()
    for folder, config in (("targets", lora(target_modules=["q_proj"])), ("rank", lora(r=5))):
        get_peft_model(tiny_llama(), config).save_pretrained(str(tmp_path / folder))
        before = {name: p.clone() for name, p in shared.named_parameters()}
        with pytest.raises(CheckpointError, match=rf"{folder} does not fit role policy: .*lora_A"):
            shared.load_role("policy", tmp_path / folder)
        assert all(torch.equal(p, before[name]) for name, p in shared.named_parameters())
    with pytest.raises(CheckpointError, match="nowhere is not a folder"):
        shared.load_role("policy", tmp_path / "nowhere")


def test_a_foreign_head_is_refused(tmp_path: Path) -> None:
    shared, path = tiny_shared(), tmp_path / "head.safetensors"
    with pytest.raises(CheckpointError, match="there is no file"):
        shared.load_head("value", path)
    save_file({"weight": torch.zeros(8), "bias": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"weight has shape \(8,\), expected \(32,\)"):
        shared.load_head("value", path)
    save_file({"weight": torch.zeros(32)}, path)
    with pytest.raises(CheckpointError, match=r"bias has shape None, expected \(1,\)"):
        shared.load_head("value", path)
    for number, words in ((math.nan, "holds NaN or infinity in weight"), (3e38, r"holds 3e\+38 in weight")):
        save_file({"weight": torch.full((32,), number), "bias": torch.zeros(1)}, path)
        with pytest.raises(ModelError, match=words):
            shared.load_head("value", path)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ModelError, match="no readable weights"):
        shared.load_head("value", path)


# ---- starting from an adapter ----------------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """An SFT adapter as plain PEFT writes it, with the dropout it was trained with."""
    torch.manual_seed(5)
    get_peft_model(tiny_llama(), lora(r=2, target_modules=["q_proj", "up_proj"], lora_dropout=0.1)).save_pretrained(
        str(tmp_path)
    )
    return tmp_path


def test_reference_is_a_frozen_copy_of_the_policys_start(start: Path) -> None:
    shared, (ids, mask) = (
        build_ppo_roles(tiny_llama(), lora(), policy_adapter=str(start), reference_adapter=str(start)),
        sequences_and_mask(*LENGTHS),
    )
    assert shared.parameter_groups().keys() == {"policy", "value", "value_head"}
    assert not any(p.requires_grad for name, p in shared.named_parameters() if ".reference." in name)
    with torch.no_grad():
        out = shared.train()(rows_of(ids, mask), roles=("policy", "value", "reference"))
    assert torch.equal(out.policy_logprobs, out.reference_logprobs)
    model = PeftModel.from_pretrained(tiny_llama(), start).eval()
    with torch.no_grad():
        logp = model(input_ids=ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    close(out.reference_logprobs, logp[mask[:, 1:]])


def test_it_stays_where_it_was_when_the_policy_moves(start: Path) -> None:
    shared, (ids, mask) = (
        build_ppo_roles(tiny_llama(), lora(), policy_adapter=str(start), reference_adapter=str(start)),
        sequences_and_mask(*LENGTHS),
    )
    optimizer = torch.optim.SGD([p for p in shared.parameters() if p.requires_grad], lr=0.1)
    before = shared(rows_of(ids, mask), roles=("policy", "reference"))
    before.policy_logprobs.sum().backward()
    optimizer.step()
    after = shared(rows_of(ids, mask), roles=("policy", "reference"))
    assert torch.equal(before.reference_logprobs, after.reference_logprobs)
    assert not torch.allclose(before.policy_logprobs, after.policy_logprobs, atol=1e-3)


def test_without_an_adapter_to_start_from_policy_is_reference_is_base() -> None:
    """PEFT starts B at zero."""
    shared, (ids, mask) = (
        build_ppo_roles(tiny_llama(), lora(init_lora_weights=True), policy_adapter=None),
        sequences_and_mask(*LENGTHS),
    )
    out = shared(rows_of(ids, mask), roles=("policy", "reference"))
    assert torch.equal(out.policy_logprobs, out.reference_logprobs)
    assert not [name for name, _ in shared.named_parameters() if ".reference." in name]


def test_a_start_that_is_no_lora_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no adapter_config\.json"):
        build_ppo_roles(tiny_llama(), lora(), policy_adapter=str(tmp_path), reference_adapter=str(tmp_path))
    ia3 = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    get_peft_model(tiny_llama(), ia3).save_pretrained(str(tmp_path))
    with pytest.raises(ModelError, match=r"peft_type=.IA3.; only LORA"):
        build_ppo_roles(tiny_llama(), lora(), policy_adapter=str(tmp_path), reference_adapter=str(tmp_path))


def test_the_base_is_not_registered_twice() -> None:
    """A head that owned the output layer would show in checkpoints and be trained under another name."""
    shared = tiny_shared()
    assert isinstance(shared.causal_lm.lm_head, nn.Linear)
    assert [name for name in shared.state_dict() if "lm_head" in name or "policy_head" in name] == [
        "base_model.model.lm_head.weight"
    ]


def test_new_adapters_are_not_rounded_to_the_dtype_of_the_base() -> None:
    """They are those over a float32 base of the same seed, where PEFT alone would leave half of the values."""
    starts = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(1)
        base: Any = tiny_llama().to(dtype)  # type: ignore[arg-type]
        torch.manual_seed(2)
        shared = SharedBase(base, {role: lora(init_lora_weights=True) for role in ("policy", "value")})
        starts[dtype] = {name: p for name, p in shared.named_parameters() if "lora_" in name}
        assert not any(hasattr(module, "compute_dtype") for module in shared.modules())
    assert all(torch.equal(p, starts[torch.float32][name]) for name, p in starts[torch.bfloat16].items())
