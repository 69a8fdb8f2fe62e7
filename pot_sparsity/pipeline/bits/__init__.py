"""Bits of weights and activations, chosen layer by layer."""
