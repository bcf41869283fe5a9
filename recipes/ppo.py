"""PPO on a shared base: `accelerate launch --config_file accelerate_configs/X.yaml recipes/ppo.py --config Y.yaml
[section.key=value ...]`."""

from __future__ import annotations

from rlhf_toolkit.errors import reported
from rlhf_toolkit.settings.command import read_command
from rlhf_toolkit.settings.experiment import Experiment


def main() -> None:
    command = read_command(Experiment, __doc__)

    # Only now torch and the libraries on it: what is wrong with the settings has been said at once.
    from rlhf_toolkit.reporting.report import print_report
    from rlhf_toolkit.runs.ppo import prepare

    run = prepare(command.experiment, resume=command.resume, overwrite=command.overwrite)
    print_report(run.folder, run.train())


if __name__ == "__main__":
    with reported():
        main()
