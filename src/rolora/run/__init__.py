"""One run: the experiment that a configuration describes, its folder, start, resume, evaluation."""
