"""What answers are worth: functions of rollouts, and of the facts of their rows."""
