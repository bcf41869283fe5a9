"""What happens to a run's result: merged into its base, described, talked to."""
