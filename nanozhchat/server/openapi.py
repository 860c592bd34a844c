"""The OpenAPI description: FastAPI's, with the bodies that `schemas` checks by itself."""

from typing import Any

from fastapi import FastAPI

from nanozhchat.server import schemas

BODIES = {"/v1/chat/completions": schemas.ChatBody, "/v1/completions": schemas.TextBody,
          "/tokenize": schemas.TokenizeBody, "/detokenize": schemas.DetokenizeBody}  # fmt: skip
STATUSES = (400, 401, 403, 404, 408, 413, 415, 429, 500, 503)


def describe(app: FastAPI) -> dict[str, Any]:
    """Return the description of all public routes."""
    page = FastAPI.openapi(app)
    shared = page.setdefault("components", {}).setdefault("schemas", {})
    for path, kind in BODIES.items():
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        shared.update(schema.pop("$defs", {}))
        page["paths"][path]["post"]["requestBody"] = {"required": True,
                                                      "content": {"application/json": {"schema": schema}}}  # fmt: skip
    for operations in page["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            operation["responses"] |= {str(status): {"description": "an error object"} for status in STATUSES}
    return page
