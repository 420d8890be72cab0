"""LayerRoute: adaptive depth for agents. A step that does not need a block does not run it."""
