"""A corpus read, checked and tokenized once, on disk: what jobs of any size start from in seconds."""
