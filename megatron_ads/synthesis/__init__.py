"""Reasoning for rows that have a label: generate, check on a golden set, sample by rejection, write a corpus."""
