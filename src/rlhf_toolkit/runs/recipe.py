"""What the recipes of supervised runs do. torch is imported once their settings are known to be sound."""

from __future__ import annotations

from rlhf_toolkit.settings.command import read_command
from rlhf_toolkit.settings.experiment import FineTuning


def run_recipe(kind: type[FineTuning], description: str | None) -> None:
    """A supervised recipe: read its command line, run the experiment, print the report."""
    command = read_command(kind, description)

    from rlhf_toolkit.reporting.report import print_report
    from rlhf_toolkit.runs.fine_tuning import prepare_fine_tuning

    run = prepare_fine_tuning(command.experiment, resume=command.resume, overwrite=command.overwrite)
    print_report(run.folder, run.train())
