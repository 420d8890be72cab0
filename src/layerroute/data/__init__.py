"""Transcripts -> conversations -> steps -> batches."""
