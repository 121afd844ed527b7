"""Verification by the emulator: built variants executed on any CPU, judged by the contract's bounds, recorded in the manifest.

``cases`` lists what is run, ``running`` runs one case, ``journal`` keeps partial results, ``verify`` puts them together, ``quickstart`` runs a layer.
The emulator itself is ``densemoe.compile.emulator``.
"""
