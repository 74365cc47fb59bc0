"""How bytes are read and written. Knows nothing of what they mean to a package."""
