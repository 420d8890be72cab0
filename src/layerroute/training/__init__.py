"""Training: transcript -> step -> batch -> routed forward -> objective -> optimiser."""
