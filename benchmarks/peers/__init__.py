"""The same workloads in other frameworks, each as its user would set it up."""
