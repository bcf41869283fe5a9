"""From prompts to experience: sampling, scores, the role pass, and the loader Trainer iterates."""
