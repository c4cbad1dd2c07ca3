"""What runs an op: the native modules of each device, loaded and called here."""
