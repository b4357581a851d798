"""Trains many linear heads at once."""
