"""How well a checkpoint does an ads task: it generates, the answer is parsed, the task's metric is computed."""
