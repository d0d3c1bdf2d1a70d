"""What every rank is about to do, compared before the first step."""
