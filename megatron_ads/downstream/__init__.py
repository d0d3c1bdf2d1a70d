"""A small ads pipeline that is trained once and frozen: retrieval and ranking, for rewards to put answers into."""
