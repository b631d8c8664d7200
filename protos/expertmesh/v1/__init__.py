"""Generated protocol stubs of package expertmesh.v1; `make protos` writes them anew."""
