"""Recurrent layers' operators over ragged rows, one launch each. For CUDA.

A program holds a part of one state in registers, takes it through all tokens of its row, and writes
it back behind the last accepted one: a state is read once and written once, however many tokens
there are. Nothing waits for the device: what a host would have to look at to refuse it is instead
harmless. Rows outside the states and what is beyond Q tokens count as no token.
"""
