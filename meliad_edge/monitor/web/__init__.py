"""The page of a running watch and its HTTP interface; needs the extra ``monitor``."""

from meliad_edge.errors import MissingExtraError

try:
    import fastapi as fastapi
    import prometheus_client as prometheus_client
    import uvicorn as uvicorn
except ModuleNotFoundError as error:
    raise MissingExtraError((error.name or "fastapi").replace("_", "-"), "monitor") from error
