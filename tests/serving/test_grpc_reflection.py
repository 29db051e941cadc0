"""A client that has no router.proto asks the server what there is."""

import asyncio
from functools import partial

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from moe_router.serving import router_pb2 as pb
from moe_router.serving.grpc_server import Adder, serve_grpc
from moe_router.serving.router_pb2_grpc import (
    GenerationServicer,
    add_GenerationServicer_to_server,
)


def ask_by_reflection(port, metadata=()):
    """Services of a server, and its answer to Health: nothing of ours is imported for it."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as plain:
        channel = grpc.intercept_channel(plain, *([Sender(metadata)] if metadata else []))
        known = ProtoReflectionDescriptorDatabase(channel)
        services = list(known.get_services())
        pool = descriptor_pool.DescriptorPool(known)
        method = pool.FindServiceByName("moe_router.v1.Generation").FindMethodByName("Health")
        request, reply = map(
            message_factory.GetMessageClass, (method.input_type, method.output_type)
        )
        call = channel.unary_unary(
            f"/{method.containing_service.full_name}/{method.name}",
            request_serializer=request.SerializeToString,
            response_deserializer=reply.FromString,
        )
        return services, call(request(), timeout=10).reason


class Sender(grpc.StreamStreamClientInterceptor, grpc.UnaryUnaryClientInterceptor):
    """Adds metadata to each call."""

    def __init__(self, metadata):
        self.metadata = list(metadata)

    def _with(self, go, details, request):
        return go(details._replace(metadata=self.metadata), request)

    intercept_stream_stream = intercept_unary_unary = _with


class Well(GenerationServicer):
    async def Health(self, request, context):
        return pb.HealthReply(reason="by reflection")


def test_a_client_without_stubs_learns_what_to_ask():
    async def go(token, metadata):
        add = partial(add_GenerationServicer_to_server, Well())
        adders = [Adder("moe_router.v1.Generation", add)]
        server, port = await serve_grpc(adders, token=token)
        try:
            return await asyncio.to_thread(ask_by_reflection, port, metadata)
        finally:
            await server.stop(None)

    mine = (("authorization", "Bearer secret"),)
    for token, metadata in ((None, ()), ("secret", mine)):
        services, said = asyncio.run(go(token, metadata))
        assert services == [
            "grpc.reflection.v1alpha.ServerReflection",
            "moe_router.v1.Generation",
        ]
        assert said == "by reflection"
    with pytest.raises(grpc.RpcError) as refused:
        asyncio.run(go("secret", ()))
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
