"""What tests share: models, tokenizers and batches in miniature, rewards that fail, processes and ranks."""
