"""Post-training sparsity and INT8 for exported networks."""
