"""An ads business drawn from a known latent model: its texts, its logs, and rows with true labels for every task."""
