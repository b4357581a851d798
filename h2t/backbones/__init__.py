"""Frozen networks of timm, their taps, and the pooled features that are read there."""
