"""Sections that run PPO: first ratio and sampling gap in bfloat16, whole runs with and without DeepSpeed, and TRL's."""

from __future__ import annotations

import argparse
import importlib.util
import math
import subprocess
import sys
from typing import Any

import yaml
from common import ROOT, prepared
from exam.subject import DEVICE, UNSTOPPED, Exam, folder_of, made_on, records, sections_of
from ranks import environment, launch_config

WATCHED = ("first_ratio", "logprob_gap", "rounding", "ref_kl", "entropy")  # parts of metrics' names


# ---- 3: first ratio and gap ------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "packed, exact": {},
    "padded, exact": {"update__packing": "off"},
    "packed, merged": {"rollout__weights": "merged"},
}


def ratio(exam: Exam) -> None:
    """Two rollouts in bfloat16, two updates each, so that the first ratio is looked at in both; nothing stops them.
    With the default settings the runs of section ppo stop where the toolkit thinks they should."""
    for number, (name, changes) in enumerate(VARIANTS.items()):
        sections = sections_of(
            exam,
            exam.sizes.small,
            f"ratio_{number}",
            model__dtype="bfloat16",
            ppo__num_rollouts=2,
            ppo__mini_batches=2,
            rollout__responses_per_prompt=2,
            **UNSTOPPED,
            **changes,
        )
        with made_on():
            prepared(sections).train()
        found = records(exam.work / f"ratio_{number}")
        exam.report.figure(**{name: [{k: v for k, v in r.items() if any(w in k for w in WATCHED)} for r in found]})
        for key, most in (("actor/first_ratio_mean_deviation", 0.01), ("rollout/logprob_gap_mean", 0.1)):
            values = [record[key] for record in found if key in record]
            if values:
                exam.report.check(f"{name}: {key}", max(values), most)


# ---- 4: whole runs ---------------------------------------------------------------------------------------------------


def ppo(exam: Exam) -> None:
    """The recipe as a user starts it: one process with ZeRO-3, then without DeepSpeed; the same rollouts of both."""
    found = {name: whole_run(exam, name, stage) for name, stage in (("zero3", 3), ("plain", None))}
    if all(found.values()):
        first, second = (record[0]["critic/score/mean"] for record in found.values())
        exam.report.check("difference of the first rollouts' scores", abs(first - second), 0.05)


def quantised_ppo(exam: Exam) -> None:
    """The same over quantised bases, which are quantised while they are loaded, with moments in 8 bits."""
    zero3 = {"model__quantization": "nf4", "update__optimizer": "adamw_8bit"}
    plain = {"model__quantization": "float8"}
    if DEVICE == "cuda":
        plain["update__optimizer"] = "paged_adamw_8bit"
    for name, stage, changes in (("nf4, zero3", 3, zero3), ("float8, plain", None, plain)):
        whole_run(exam, name.replace(", ", "_"), stage, ppo__num_rollouts=2, **changes)


def whole_run(exam: Exam, name: str, stage: int | None, **changes: Any) -> list[dict[str, Any]]:
    """A run of ``recipes/ppo.py`` under ``accelerate launch``, and checks of its records, which it returns."""
    folder_of(exam, exam.sizes.small, weights=True)
    changes = {"model__dtype": "bfloat16", "rollout__responses_per_prompt": 2, **changes}
    sections = sections_of(exam, exam.sizes.small, name, **changes)
    config, launch = exam.work / f"{name}.yaml", exam.work / f"{name}_launch.yaml"
    config.write_text(yaml.safe_dump(sections))
    launch.write_text(yaml.safe_dump(launch_config(1, stage)))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(launch)]
    command += [str(ROOT / "recipes/ppo.py"), "--config", str(config), "--overwrite"]
    print(f"--- {name} ---", flush=True)
    if subprocess.run(command, env=environment(1), check=False).returncode != 0:  # its output goes to exam.log
        exam.report.check(f"{name}: the run ends", False)
        return []
    found = records(exam.work / name)
    finite = all(math.isfinite(value) for line in found for value in line.values() if isinstance(value, float))
    complete = finite and len(found) == changes.get("ppo__num_rollouts", exam.sizes.rollouts)
    exam.report.check(f"{name}: every rollout, all numbers finite", complete)
    exam.report.check(f"{name}: the policy moves", bool(found) and found[-1].get("actor/ref_kl", 0.0) != 0.0)
    last = found[-1]
    exam.report.figure(
        **{
            name: {
                "seconds_per_rollout": [line["timing_s/step"] for line in found],
                "phases_of_the_last": {k: v for k, v in last.items() if k.startswith("timing_s/")},
                "tokens_per_second": last["perf/throughput"],
                "peak_gib": last["perf/max_memory_allocated_gb"],
                "scores": [line["critic/score/mean"] for line in found],
                "ref_kl": [line.get("actor/ref_kl") for line in found],
            }
        }
    )
    return found


# ---- 8: TRL ----------------------------------------------------------------------------------------------------------


def missing_of_trl() -> str:
    """What TRL's contestant imports and this environment lacks; empty where it can begin. A folder named ``trl`` is
    none, and versions after 1.12 have no PPO."""
    for module in ("trl.experimental.ppo.ppo_trainer", "vaderSentiment.vaderSentiment"):
        try:
            found = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:  # of a package on the way
            found = False
        if not found:
            return f"{module} is not installed"
    return ""


def trl(exam: Exam) -> None:
    """``bench/versus_trl.py`` with the exam's model, where a TRL that has PPO is installed beside this toolkit."""
    missing = missing_of_trl()
    if missing:
        exam.report.figure(left_out=missing)
        return
    from versus_trl import compare

    folder = folder_of(exam, exam.sizes.small, weights=True)
    options = argparse.Namespace(turns=exam.sizes.turns, only_ours=False, trl_python=sys.executable)
    found = compare(str(folder), options)
    exam.report.figure(contestants=found["contestants"], ratios=found["ratios"], device=DEVICE)
    for name, ratios in found["ratios"].items() if DEVICE == "cuda" else ():
        exam.report.check(f"{name}: time over TRL's", ratios["time"], 1.0)
        exam.report.check(f"{name}: memory over TRL's", ratios["memory"], 1.0)
