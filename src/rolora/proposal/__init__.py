"""What ``rolora init`` proposes for the rows of a user: a commented configuration."""
