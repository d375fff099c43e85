"""Learn scores: the objectives, the networks, and the models that the suite offers."""
