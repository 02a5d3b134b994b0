"""Proof that every layout computes the same numbers as one process in float64."""
