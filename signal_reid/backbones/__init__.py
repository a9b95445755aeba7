"""Backbones: each is a file, or a folder, that owns its network and the namings of its weight files."""
