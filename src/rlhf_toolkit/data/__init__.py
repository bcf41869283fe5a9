"""From dataset rows and a tokenizer to the prompts of each rollout."""
