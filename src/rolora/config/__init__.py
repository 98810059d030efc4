"""A run's configuration: the schema, and reading a file against it."""
