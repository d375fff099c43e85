"""Any energy by any training method: the objectives, and the model of the suite that they make of a network."""
