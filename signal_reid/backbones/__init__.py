"""Backbones: each is a file that owns its network and the namings of its weight files."""
