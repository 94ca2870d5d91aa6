"""Who evaluates the members: this process, the processes of torchrun, or a pool of Ray actors."""
