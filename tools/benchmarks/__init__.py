"""Parts of tools/benchmark.py: what is measured, by whom, and against which limit."""
