"""What makes a prefix and keeps it: configs, networks, files."""
