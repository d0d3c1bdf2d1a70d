"""What a job will take on any layout, before a machine is rented: what `megatron-ads plan` runs."""
