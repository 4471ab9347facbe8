"""What tools/fidelity.py compares the labs with: a module for each kind of source."""
