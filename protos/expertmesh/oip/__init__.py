"""Stubs of the Open Inference Protocol, generated from the .proto file beside this one."""
