"""PPO for language models on a few consumer GPUs: one frozen base, small LoRA adapters for every role."""

__version__ = "0.1.0"
