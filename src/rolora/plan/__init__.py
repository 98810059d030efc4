"""What a run needs, worked out on shapes alone."""
