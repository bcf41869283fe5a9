"""What a run says about itself: metrics, the JSONL log, W&B and the summary."""
