"""What is written: the manifest, as bytes and as dataclasses. Knows nothing of how bytes are read and written."""
