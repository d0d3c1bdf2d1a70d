"""What a model looks like, and how the ``config.json`` of each family says so. Standard library only."""
