"""Evaluation: skip rates, perplexity, what routing saves, the controls, and the report."""
