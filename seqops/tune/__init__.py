"""Choosing tile constants: see `csp` for the solver, `device` for the hardware model, `search` for timing."""
