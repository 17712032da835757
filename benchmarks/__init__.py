"""Comparisons with other code and with other ways to write the same thing; not part of the wheel.

python -m benchmarks.compare --help
python -m benchmarks.forms --help
python -m benchmarks.guards --help
"""
