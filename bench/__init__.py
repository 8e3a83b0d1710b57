"""Measurements: kernels launch by launch, decoding end to end, the fitted model, pictures.

Every measurement is one JSON line that carries its environment; every table and picture is made
from such lines. Letters: ``B`` sequences, ``T`` tokens entering the MoE layer, ``E`` experts,
``K`` experts per token, ``H`` hidden, ``I`` expert intermediate, ``gamma`` draft length.
"""
