"""A model that a program has in memory, on two ranks: one base, sharded without a second copy, or a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_toolkit.checkpoints import base_fingerprint
from rlhf_toolkit.distributed.topology import Topology
from rlhf_toolkit.distributed.zero3 import is_partitioned
from rlhf_toolkit.errors import TopologyError
from rlhf_toolkit.given import MODEL, given
from rlhf_toolkit.models.loading import load_base, load_model_config
from rlhf_toolkit.runs.weights import require_one_model
from tests.support.launch import run_worker
from tests.support.tiny import tiny_llama

OPTIONS: dict[str, dict[str, Any]] = {"plain": {"attention_dropout": 0.1}, "tied": {"tie_word_embeddings": True}}


def bases(topology: Topology, models: str) -> dict[str, Any]:
    """For each model and kind of storage the fingerprints of the base of files and of that of an object, on this
    rank."""
    found = dict[str, Any]()
    for name, options in OPTIONS.items():
        for kind in ("none", "nf4"):
            prints = []
            for model in (None, tiny_llama(**options)):
                place = f"{models}/{name}"
                objects = {} if model is None else {(MODEL, place): model}
                with given(objects):
                    require_one_model(place)
                    config = load_model_config(place)
                    base = load_base(place, config, topology, dtype=torch.bfloat16, attention="sdpa", quantization=kind)
                prints.append(base_fingerprint(base.config.to_json_string(), list(base.named_parameters())))
                assert all(is_partitioned(parameter) for parameter in base.parameters())
                assert base.config.attention_dropout == 0.0
            assert model is not None
            left = sum(parameter.numel() for parameter in model.parameters())
            found[f"{name} {kind}"] = (*prints, left)
    other = tiny_llama()
    torch.manual_seed(topology.rank)
    other.get_input_embeddings().weight.data.normal_()  # type: ignore[union-attr,operator]
    with given({(MODEL, "x"): other}), pytest.raises(TopologyError, match="weights of the model that was given"):
        require_one_model("x")
    return found


@pytest.mark.thorough
def test_a_model_in_memory_is_sharded_as_its_files_are(tmp_path: Path) -> None:
    for name, options in OPTIONS.items():
        tiny_llama(**options).save_pretrained(tmp_path / name)
    first, second = run_worker(f"{__name__}:bases", tmp_path, models=str(tmp_path))
    assert first == second
    for case, (of_files, of_object, left) in first.items():
        assert of_files == of_object, case
        assert left == 0, "a rank holds its part alone"
