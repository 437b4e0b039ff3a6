"""Computing it: the steps of a program, the backends, and the public `attention` and `plan`."""
