"""The cases of ``benchmarks.run``: each measures work next to a reference, in turn, in one process or one run."""
