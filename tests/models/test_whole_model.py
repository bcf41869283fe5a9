"""A model that is trained as a whole: what it says and every gradient are those of the plain model with full logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from rlhf_toolkit.data.layout import TokenLayout
from rlhf_toolkit.errors import CheckpointError, ModelError
from rlhf_toolkit.models import heads
from rlhf_toolkit.models.attention import ROLE_ATTENTION, packing_obstacle
from rlhf_toolkit.models.heads import Tile
from rlhf_toolkit.models.loading import load_base, load_model_config
from rlhf_toolkit.models.whole_model import WholeModel
from tests.models.test_architectures import HERE, WORKS, Case
from tests.support.allocations import Allocations
from tests.support.offenders import for_each
from tests.support.roles import packed_rows, rows_of, sequences_and_mask
from tests.support.tiny import tiny_llama

PROMPTS, RESPONSES = (12, 17, 12, 13, 1), (6, 2, 4, 5, 3)


def batch(vocabulary: int) -> tuple[Tensor, Tensor]:
    """Rows of which four share 12 tokens of their prompts."""
    ids, mask = sequences_and_mask(PROMPTS, RESPONSES, vocabulary=vocabulary, pad_id=0)
    ids[1:4, :12] = ids[0, :12]
    return ids, mask


def said(model: WholeModel, layout: TokenLayout) -> Tensor:
    return model(layout, roles=("policy",)).policy_logprobs


def weighted(logprobs: Tensor) -> Tensor:
    return (torch.linspace(-1, 2, len(logprobs)) * logprobs).sum()


def own_logprobs(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """From the model's own full logits of each sequence by itself."""
    parts = []
    for row, positions in zip(ids, mask, strict=True):
        end = int(positions.nonzero().max()) + 1
        logp = model(input_ids=row[None, :end], use_cache=False).logits[0, :-1].float().log_softmax(-1)
        parts.append(logp[torch.arange(end - 1), row[1:end]][positions[1:end]])
    return torch.cat(parts)


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    loss.backward()
    return {name.removeprefix("causal_lm."): parameter.grad for name, parameter in model.named_parameters()}


def loaded(case: Case, folder: Path) -> PreTrainedModel:
    return load_base(
        str(folder), load_model_config(str(folder)), HERE, dtype=torch.float32, attention=case.attention
    ).train()


def saved(case: Case, folder: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[case.model_type](**case.sizes), attn_implementation=case.attention
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3)
    model.save_pretrained(folder)


REFUSED = {
    "gemma3 with vision": r"weights that no text reaches \(model\.vision_tower.*drop sft\.full",
    "deepseek_v32, three tokens of all": r"runs weights without gradient \(model\.layers\.0\..*indexer.*drop sft",
}


@for_each("name", sorted(set(WORKS) - set(REFUSED)))
def test_every_architecture_has_the_gradients_of_full_logits(name: str, tmp_path: Path) -> None:
    """Padded and packed, tied embeddings and biased output layers among them; no parameter is left without."""
    case = WORKS[name]
    saved(case, tmp_path)
    plain, whole = loaded(case, tmp_path), WholeModel(loaded(case, tmp_path))
    ids, mask = batch(36)
    expected = own_logprobs(plain, ids, mask)
    right = gradients(plain, weighted(expected))
    layouts = [rows_of] if packing_obstacle(whole.causal_lm) else [rows_of, packed_rows]
    for layout in layouts:
        logprobs = said(whole, layout(ids, mask))
        torch.testing.assert_close(logprobs, expected, rtol=1e-4, atol=1e-4)
        found = gradients(whole, weighted(logprobs))
        assert found.keys() == right.keys()
        for parameter, gradient in right.items():
            mine = found[parameter]
            assert gradient is not None and mine is not None, parameter
            assert (mine - gradient).norm() <= 1e-4 * gradient.norm() + 1e-5, parameter


def test_what_would_never_learn_is_refused_by_name(tmp_path: Path) -> None:
    for name, words in REFUSED.items():
        saved(WORKS[name], tmp_path / name)
        with pytest.raises(ModelError, match=words):
            WholeModel(loaded(WORKS[name], tmp_path / name))


def llama(**options: Any) -> PreTrainedModel:
    return tiny_llama(attn_implementation=ROLE_ATTENTION, initializer_range=0.2, **options)


@pytest.mark.parametrize("layout", [rows_of, packed_rows], ids=["padded", "packed"])
@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradient_checkpointing_keeps_less_and_changes_no_bit(layout: Any, products: torch.dtype) -> None:
    (ids, mask), found, kept = batch(32), [], []
    for checkpointing in (False, True):
        model = WholeModel(llama(), gradient_checkpointing=checkpointing, products=products).train()
        tensors = list[Tensor]()

        def keep(tensor: Tensor, tensors: list[Tensor] = tensors) -> Tensor:
            tensors.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = weighted(said(model, layout(ids, mask)))
        kept.append(len(tensors))
        found.append(gradients(model, loss))
    assert kept[1] < kept[0] / 4
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_bfloat16_products_leave_weights_and_gradients_in_float32(checkpointing: bool) -> None:
    """Close to float32, and not the same; packed rows say what padded ones say."""
    ids, mask = batch(32)
    exact = WholeModel(llama()).train()
    right = gradients(exact, weighted(said(exact, rows_of(ids, mask))))
    model = WholeModel(llama(), products=torch.bfloat16, gradient_checkpointing=checkpointing).train()
    for layout in (rows_of, packed_rows):
        found = gradients(model, weighted(said(model, layout(ids, mask))))
        for name, gradient in found.items():
            assert gradient is not None and gradient.dtype == torch.float32
            off = float((gradient - right[name]).norm() / right[name].norm())  # type: ignore[operator, union-attr]
            assert 1e-5 < off < 0.05, (name, off)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("layout", [rows_of, packed_rows], ids=["padded", "packed"])
def test_no_tensor_is_larger_than_the_output_layers_gradient(
    monkeypatch: pytest.MonkeyPatch, layout: Any, tied: bool
) -> None:
    """Logits of all positions would be."""
    monkeypatch.setattr(heads, "CPU_TILE", Tile(1024, 512, 1024))
    vocabulary = 4096
    model = WholeModel(llama(vocab_size=vocabulary, tie_word_embeddings=tied)).train()
    ids, mask = sequences_and_mask(PROMPTS, [40] * 5, vocabulary=vocabulary, pad_id=0)
    with Allocations() as forward:
        logprobs = said(model, layout(ids, mask))
    assert forward.above(vocabulary * 8) == []
    with Allocations() as backward:
        weighted(logprobs).backward()
    assert backward.largest == model.causal_lm.get_output_embeddings().weight.numel() < len(logprobs) * vocabulary


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_saved_loaded_and_plain(tmp_path: Path, tied: bool) -> None:
    """What is saved is a folder of transformers; what is loaded has the same bits; a broken folder is refused."""
    model, other = WholeModel(llama(tie_word_embeddings=tied)), WholeModel(llama(tie_word_embeddings=tied))
    model.config.use_cache = False  # as Trainer does
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    clones = {name: tensor.clone() for name, tensor in model.state_dict().items()}  # as under ZeRO: no ties to be seen
    model.save_pretrained(tmp_path, state_dict=clones)
    assert ("lm_head.weight" in load_file(tmp_path / "policy/model.safetensors")) is not tied
    other.load_trained(tmp_path)
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype="auto").eval()
    assert plain.dtype == torch.float32 and plain.config.use_cache and plain.config._attn_implementation == "sdpa"
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, model.causal_lm.eval()(ids).logits, rtol=1e-5, atol=1e-5)

    weights = {name: tensor[:0] for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="tensors are empty"):
        model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(CheckpointError, match=r"nowhere/policy is not a folder"):
        other.load_trained(tmp_path / "nowhere")
