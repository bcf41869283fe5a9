"""What makes a run of an experiment, trains it or evaluates it."""
