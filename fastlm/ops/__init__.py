"""One file an op: reference, backends, autograd, registered op, public function, in that order."""
