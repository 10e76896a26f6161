"""What all families share: structure, records, contracts."""
