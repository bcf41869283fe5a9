"""Direct preference optimisation of a LoRA adapter:

accelerate launch --config_file accelerate_configs/X.yaml recipes/dpo.py --config Y.yaml [section.key=value ...]
"""

from __future__ import annotations

from rlhf_toolkit.errors import reported
from rlhf_toolkit.runs.recipe import run_recipe
from rlhf_toolkit.settings.experiment import DPOExperiment

if __name__ == "__main__":
    with reported():
        run_recipe(DPOExperiment, __doc__)
