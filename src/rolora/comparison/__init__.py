"""Methods on equal terms: tuned the same way, run on fresh seeds, in a resumable queue."""
