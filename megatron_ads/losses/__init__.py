"""Training objectives: functions from the values of one microbatch's tokens to a sum, a count and reported numbers."""
