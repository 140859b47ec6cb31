"""Calls any method of a gRPC server, known by its address alone: types come from its reflection."""

import grpc
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)


class Caller:
    def __init__(self, address, compression=None):
        self.channel = grpc.insecure_channel(address, compression=compression)
        self.database = ProtoReflectionDescriptorDatabase(self.channel)
        self.pool = descriptor_pool.DescriptorPool(self.database)

    def close(self):
        self.channel.close()

    def services(self):
        return self.database.get_services()

    def call(self, name, **fields):
        service, method = name.split("/")
        found = self.pool.FindServiceByName(service).FindMethodByName(method)
        request = message_factory.GetMessageClass(found.input_type)(**fields)
        answer = message_factory.GetMessageClass(found.output_type)
        kind = self.channel.unary_stream if found.server_streaming else self.channel.unary_unary
        invoke = kind(
            "/" + name,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=answer.FromString,
        )
        outcome = invoke(request, timeout=120)
        return list(outcome) if found.server_streaming else outcome
