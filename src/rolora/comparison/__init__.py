"""Methods on equal terms: tuned alike, run on fresh seeds, in a queue that can be left."""
