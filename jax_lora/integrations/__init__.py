"""Other projects' own interfaces over these kernels; each module imports its project."""
