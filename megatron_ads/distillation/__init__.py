"""A teacher's answers, their quality control, a smaller model fine-tuned on them, and how near it comes."""
