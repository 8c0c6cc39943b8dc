"""The protocol over gRPC: packages kv_cache_manager.proto.meta, .admin and .debug.

*.proto         the messages and services, for clients in any language
protos          their classes, made from ``descriptors.binpb``, which protoc made from the .proto files
convert         our messages <-> theirs
locations       locations as protobuf bytes
servicer        a call from its request to its response
methods         what Ray Serve's gRPC ingress calls on a replica, and what it registers
client          a small client, for tests, benchmarks and scripts
loopback        keeps Serve's gRPC servers off outer addresses
"""
