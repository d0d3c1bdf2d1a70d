"""How a job is started, watched and started again: checks of recipe and machine, torchrun, Slurm. No GPU, no torch."""
