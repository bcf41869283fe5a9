"""PPO for language models on a few consumer GPUs: one frozen base, small LoRA adapters for every role."""

import logging

__version__ = "0.1.0"

# PEFT imports bitsandbytes where that is installed, which on a CPU looks for a kernel of the hub's that nothing here
# uses, and warns at every start that it has found none.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
