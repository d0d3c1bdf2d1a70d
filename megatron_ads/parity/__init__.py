"""Does the trainer compute what Hugging Face computes, on a checkpoint of any size? Streams layer by layer."""
