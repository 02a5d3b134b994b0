"""What the training entries share: start, resume, step boundaries, rollouts, evaluation, the end."""
