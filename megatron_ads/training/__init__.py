"""Building, stepping, saving and exporting a fine-tuning job."""
