"""What every kind of run settles before anything is loaded."""

from __future__ import annotations

import pytest
import torch

from rlhf_toolkit.distributed.topology import Launch, Topology
from rlhf_toolkit.errors import ConfigError
from rlhf_toolkit.runs.run import with_dtype
from rlhf_toolkit.settings.experiment import Experiment
from rlhf_toolkit.settings.loading import experiment_from_dict

HERE = Topology(Launch.from_environment({}), 0, 1, torch.device("cpu"))


def experiment(dtype: str) -> Experiment:
    sections = {"model": {"name": "m", "dtype": dtype}, "data": {"train": "d"}, "reward": {"function": "f:f"}}
    return experiment_from_dict(sections, Experiment)


def test_auto_becomes_a_dtype_that_run_json_can_name() -> None:
    assert with_dtype(experiment("auto"), HERE).model.dtype in ("bfloat16", "float32")
    assert with_dtype(experiment("float32"), HERE) == experiment("float32")


def test_float16_is_refused_where_it_would_lose_gradients() -> None:
    with pytest.raises(ConfigError, match=r"float16.*gradients.*bfloat16.*float32"):
        with_dtype(experiment("float16"), HERE)
    assert with_dtype(experiment("float16"), HERE, trains=False).model.dtype == "float16"
