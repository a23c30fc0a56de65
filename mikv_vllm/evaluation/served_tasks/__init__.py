"""Tasks that a running server answers at several ratios; code checks the answers."""
