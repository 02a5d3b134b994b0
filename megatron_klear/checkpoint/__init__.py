"""Checkpoints: saving and resuming a run, and converting to and from Hugging Face."""
