"""Semantic IDs: item embeddings quantized into a few codes, as tokens that a language model reads and writes."""
