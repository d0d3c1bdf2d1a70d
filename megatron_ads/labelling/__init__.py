"""Batch labelling: rows without answers go through a model, epoch by epoch, and come out as Parquet files of labels."""
