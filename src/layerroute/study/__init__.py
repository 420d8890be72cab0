"""A study: named variants over seeds, each run trained, measured and kept with all that repeats it."""
