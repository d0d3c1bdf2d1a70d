"""What a job needs below its model: devices, process groups, seeds, and the means to see and survive its failures."""
