"""Sources of the GPU kernels. Imported by the ahead-of-time compiler and by tests, never by the daemon."""
