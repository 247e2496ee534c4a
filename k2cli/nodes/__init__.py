"""Access to machines: in process to this one, over OpenSSH to others."""
