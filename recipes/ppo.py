"""PPO on a shared base: `accelerate launch --config_file accelerate_configs/X.yaml recipes/ppo.py --config Y.yaml
[section.key=value ...]`."""

from __future__ import annotations

import argparse

from rlhf_toolkit.config_loading import load_experiment, parse_overrides
from rlhf_toolkit.errors import reported
from rlhf_toolkit.experiment import Experiment
from rlhf_toolkit.reporting.report import print_report
from rlhf_toolkit.trainers.ppo_run import prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="the experiment's YAML file")
    parser.add_argument("--resume", action="store_true", help="continue from the run folder's last complete checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in the run folder")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that replace those of the file"
    )
    arguments = parser.parse_args()

    experiment: Experiment = load_experiment(arguments.config, parse_overrides(arguments.overrides))
    run = prepare(experiment, resume=arguments.resume, overwrite=arguments.overwrite)
    summary = run.train()
    print_report(run.folder, summary)


if __name__ == "__main__":
    with reported():
        main()
