"""What a run needs of a machine, found without the machine."""
