"""The fuzzer behind `fastlm verify`: random calls of every op against the fp64 reference.

`tolerance` is the rule of what counts as right, `guards` puts margins around buffers, `op` says what an op is,
one file an op draws its calls, `checks` runs one call, `fuzz` runs many.
"""
