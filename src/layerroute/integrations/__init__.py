"""Bridges to other projects' tools; each is imported only by those who use it."""
