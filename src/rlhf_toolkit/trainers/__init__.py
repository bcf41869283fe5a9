"""Subclasses of ``transformers.Trainer`` that stay Trainers."""
