"""What is computed: one page per algorithm. base.py says what an algorithm is."""
