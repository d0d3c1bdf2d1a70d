"""What a run tells people: log lines, a progress bar, metrics per step, and a report at the end."""
