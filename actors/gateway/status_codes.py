"""Which gRPC status does a client get for an error?"""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from expertmesh.cluster.errors import CapacityError, ConflictError, InputError, UnavailableError

logger = logging.getLogger(__name__)

RETRY_DELAY_MS = 1000

Context = grpc.aio.ServicerContext[Any, Any]


@asynccontextmanager
async def errors_to_status(context: Context, call: str) -> AsyncIterator[None]:
    """Abort the call with the status code of the error raised inside.

    InputError is INVALID_ARGUMENT, CapacityError RESOURCE_EXHAUSTED with a retry delay, ConflictError
    FAILED_PRECONDITION, UnavailableError UNAVAILABLE.
    All else is INTERNAL: the client is told `call` (a request id, say) to look for, the log has the traceback.
    """
    try:
        yield
    except InputError as error:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
    except CapacityError as error:
        retry = (("grpc-retry-pushback-ms", str(RETRY_DELAY_MS)),)
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error), retry)
    except ConflictError as error:
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
    except UnavailableError as error:
        await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
    except Exception:
        logger.exception("%s failed", call)
        await context.abort(grpc.StatusCode.INTERNAL, f"internal error; look for {call} in the gateway's log")
