"""A Python client: streams that survive a broken connection, and calls that wait as long as the server says.

    with Client("localhost:50051") as client:
        for message in client.generate("def main():", max_tokens=100):
            print(message.text, end="", flush=True)

Over TLS with `credentials=grpc.ssl_channel_credentials(ca_pem)`, with an API key by `api_key=`; see ConnectionOptions.
Results are the messages of expertmesh.v1, whose comments give units and limits; errors are gRPC's own.
"""

from expertmesh.client.aio import AsyncClient
from expertmesh.client.connection import ConnectionOptions
from expertmesh.client.requests import Options
from expertmesh.client.sync import Client

__all__ = ["AsyncClient", "Client", "ConnectionOptions", "Options"]
