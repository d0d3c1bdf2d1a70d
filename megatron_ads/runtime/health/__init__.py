"""See that every rank of a job gets on, and end the job with the cause named where one does not."""
