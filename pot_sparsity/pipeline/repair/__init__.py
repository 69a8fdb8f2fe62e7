"""What follows on pruning: reconstruction, correction and the finish, in sequence through the network."""
