"""Benchmarks of every op and of the engine, behind `fastlm bench` and `pytest benchmarks/`.

One file an op holds its cases, its peers and its byte and FLOP counts. `case` says what a benchmark is,
`harness` keeps the time, `roof` and `memory` measure the machine and the peak, `worker` runs cases in a process
of its own, `runner` starts the workers, `results` is the file format, `report`, `plots` and `compare` read it.
"""
