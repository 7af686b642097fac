"""What the subcommands of our own do."""
