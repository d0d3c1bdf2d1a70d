"""Other questions over the same records: yes or no, one of twenty, an order of a list. Same inner shape as a task."""
