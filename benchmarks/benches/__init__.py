"""One file a bench: the parties, their work, and the record. The folder is the list of benches."""
