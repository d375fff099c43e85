"""Draw samples of a density from its score: Langevin dynamics, tempering, and the reverse of an SDE."""
