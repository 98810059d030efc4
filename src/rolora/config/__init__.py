"""A run's configuration: the schema with every default, and how a file becomes one."""
