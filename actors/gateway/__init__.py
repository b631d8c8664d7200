"""The front: gRPC server, request journal, text of tokens."""
