"""The whole trade-off in one run, and models written from it."""
