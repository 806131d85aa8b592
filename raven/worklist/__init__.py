"""Lists of work of the Hopper attention kernels, made once per mask on the host: who does what, in which order."""
