"""Solved layers, kept on disk under what they depend on, and models put together from them."""
