"""Model families: a few dials, a plan of layers, and the stack that runs any plan."""
