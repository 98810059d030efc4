"""What operators run: sites, the coordinator, keys, checks, and a trial on one machine."""
