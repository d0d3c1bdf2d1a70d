"""What a job stands on: devices, process groups, seeds, and the means to see and survive its failures."""
