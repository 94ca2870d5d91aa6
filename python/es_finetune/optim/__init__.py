"""The optimizer: EvolutionStrategy and its parts."""
