"""From prompts to experience: sampling, decoding, scoring, and the loader Trainer iterates."""
