"""`fastlm tune`: proves every GPU kernel on the GPU of this machine, and times it, for the choice of backends.

devices.py says on what, jobs.py what is to be proved, worker.py proves one kernel in a process of its own, and tuner.py
starts these processes, survives them and keeps the proof. The proof itself is fastlm/_core/proofs.py's.
"""
