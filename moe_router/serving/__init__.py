"""Requests from outside: engine, HTTP and gRPC fronts. router.proto is the gRPC contract."""
