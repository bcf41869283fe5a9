"""What the start of a run does on real ranks: the fingerprint of a base that no rank holds, DeepSpeed's buffers, time
limits."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from torch import nn
from torch.distributed import distributed_c10d

from rlhf_toolkit.distributed import zero3
from rlhf_toolkit.distributed.topology import TIMEOUT_MINUTES, Launch, Topology, deepspeed_settings
from rlhf_toolkit.distributed.zero3 import element_count, is_here, is_partitioned, own_part
from rlhf_toolkit.models.loading import build_ppo_roles, load_base, load_model_config, lora_config
from rlhf_toolkit.models.shared_base import SharedBase
from rlhf_toolkit.runs.weights import fingerprint_of
from tests.support.launch import run_worker
from tests.support.tiny import tiny_llama

HERE = Topology(Launch.from_environment({}), rank=0, world_size=1, device=torch.device("cpu"))


def roles_on(folder: str, topology: Topology) -> SharedBase:
    base = load_base(folder, load_model_config(folder), topology, dtype=torch.float32, attention="sdpa")
    adapter = lora_config(rank=4, alpha=8, rslora=False, target_modules="all-linear", exclude_modules=[])
    return build_ppo_roles(base, adapter, policy_adapter=None)


def found_at_start(topology: Topology, model_folder: str) -> dict[str, Any]:
    """On each rank: the fingerprint and what lay here whole while it was made, then the engine's buffers and groups."""
    model = roles_on(model_folder, topology)
    frozen = [p for p in model.parameters() if not p.requires_grad and is_partitioned(p)]
    here_before = sum(map(is_here, frozen))
    fingerprint = fingerprint_of(model)
    trained = [p for group in model.parameter_groups().values() for p in group]
    settings = deepspeed_settings(
        topology,
        rows_per_rank=1,
        max_grad_norm=1.0,
        largest_adapter=max(map(element_count, trained)),
        trained=sum(map(element_count, trained)),
    )
    engine = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(trained), config=settings)[0]
    optimizer = engine.optimizer
    if topology.launch.zero_stage == 2:
        optimizer.setup_buckets()
    buffers = [bucket.buffer for bucket in optimizer.ipg_buckets.values()]
    tensors = [t for buffer in buffers for t in (buffer if isinstance(buffer, list) else [buffer])]
    return {
        "fingerprint": fingerprint,
        "gathered": sum(map(is_here, frozen)) - here_before,
        "sharded": len(frozen),
        "bucket bytes": sum(tensor.nbytes for tensor in tensors),
        "trained bytes": sum(element_count(p) * 4 for p in trained),
        "time limits": [
            group._get_backend(torch.device("cpu")).options._timeout for group in distributed_c10d._world.pg_map
        ],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What two ranks found under each stage."""
    function = "tests.distributed.test_one_base_on_any_ranks:found_at_start"
    return {
        stage: run_worker(function, tmp_path_factory.mktemp(f"stage{stage}"), stage=stage, model_folder=str(folder))
        for stage in (2, 3)
    }


def test_one_fingerprint_under_every_stage_and_in_one_process(folder: Path, found: dict[int, Any]) -> None:
    alone = fingerprint_of(roles_on(str(folder), HERE))
    assert {rank["fingerprint"] for ranks in found.values() for rank in ranks} == {alone}


def test_no_rank_gathers_the_base_for_it(found: dict[int, Any]) -> None:
    assert all(rank["sharded"] > 0 and rank["gathered"] == 0 for rank in found[3])


def test_deepspeed_buffers_what_is_trained_and_no_more(found: dict[int, Any]) -> None:
    for ranks in found.values():
        for rank in ranks:
            assert rank["bucket bytes"] == rank["trained bytes"]


def test_every_process_group_has_the_time_limit(found: dict[int, Any]) -> None:
    """Those that DeepSpeed makes too."""
    for ranks in found.values():
        for rank in ranks:
            assert set(rank["time limits"]) == {timedelta(minutes=TIMEOUT_MINUTES)}
            assert len(rank["time limits"]) > 1, "DeepSpeed has made a group of its own"


def test_shards_are_counted_without_their_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.arange(7.0)
    padded = torch.cat([whole, torch.full((2,), torch.nan)])
    for rank, shard in enumerate(padded.chunk(3)):
        monkeypatch.setattr(zero3, "rank", lambda rank=rank: rank)
        parameter: Any = nn.Parameter(torch.empty(0))
        parameter.ds_id, parameter.ds_numel, parameter.ds_tensor = 0, 7, shard
        part, start = own_part(parameter)
        assert torch.equal(part, whole[start : start + 3])


@pytest.mark.parametrize("ranks", [1, 2, 5, 20])
def test_ranks_share_what_all_of_them_hold(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = nn.Parameter(torch.randn(3, 5))
    parts: list[Any] = []
    monkeypatch.setattr(zero3, "world_size", lambda: ranks)
    for rank in range(ranks):
        monkeypatch.setattr(zero3, "rank", lambda rank=rank: rank)
        part, start = own_part(parameter)
        assert not len(part) or start == sum(len(each) for each in parts)
        parts.append(part)
    assert torch.equal(torch.cat(parts), parameter.detach().flatten())


def test_a_shared_base_has_a_fingerprint_of_its_base_alone(folder: Path) -> None:
    """Adapters and heads may differ."""
    first, second = (roles_on(str(folder), HERE) for _ in range(2))
    with torch.no_grad():
        for parameter in second.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    assert fingerprint_of(first) == fingerprint_of(second)
