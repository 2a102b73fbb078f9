"""The same Device for programs in other languages: gRPC on this machine only, as clients/proto/device.proto describes it.

device.binpb is that file, compiled; its test says how. Nothing of a request or a reply reaches a log or an error: what is
refused on purpose is told in fedmini's own words, anything else by the class of the failure alone.
"""
