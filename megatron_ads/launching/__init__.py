"""How a job is started, watched and started again: checks of its surroundings, torchrun, Slurm. No GPU, no torch."""
