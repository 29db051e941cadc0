"""Requests from outside: the engine, the HTTP and gRPC fronts. router.proto is the gRPC contract."""
