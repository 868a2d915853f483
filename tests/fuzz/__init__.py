"""Inputs of every kind, damaged and odd; `benchmarks/fuzz.py` and the test beside this try them."""
