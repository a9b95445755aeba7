"""The dialect of the authors' repository: their configuration keys and their parameter names."""
