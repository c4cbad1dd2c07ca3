"""Tensors without numbers: FakeTensorMode and the meta device."""
