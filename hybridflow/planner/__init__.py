"""What is decided before the models load: what stays on the GPU. Pure Python, so that it is decided without one."""
