"""Figures of merit: pure functions of arrays; each file names its paper. `catalogue` has their names."""
