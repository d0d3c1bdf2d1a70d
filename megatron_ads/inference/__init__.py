"""Engines that generate text and say how probable it is: transformers in this process, OpenAI-compatible servers."""
