"""A checkpoint's shape and a layout made into Megatron-Core models: configuration, layers, weights, and their cost."""
