"""What touches the machine: device, processes, files, memory, console; knows nothing of re-identification."""
