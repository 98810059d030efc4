"""What operators run: a site, the coordinator, keys, checks, a trial on one machine."""
