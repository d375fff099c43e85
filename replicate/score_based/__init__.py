"""Score models, their objectives and networks."""
