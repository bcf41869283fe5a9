r"""A reward adapter from preferred pairs:

accelerate launch --config_file accelerate_configs/X.yaml recipes/reward_model.py --config Y.yaml \
      [section.key=value ...]
"""

from __future__ import annotations

from rlhf_toolkit.errors import reported
from rlhf_toolkit.runs.recipe import run_recipe
from rlhf_toolkit.settings.experiment import RewardExperiment

if __name__ == "__main__":
    with reported():
        run_recipe(RewardExperiment, __doc__)
