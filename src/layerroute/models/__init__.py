"""Backbones: where each family keeps its blocks, loading, attaching, the adapter on disk."""
