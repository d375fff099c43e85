"""Train any energy by any method: the objectives, and the suite's model of an energy network."""
