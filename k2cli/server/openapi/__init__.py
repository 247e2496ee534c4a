"""The OpenAPI document of the HTTP API, made from the types of requests and answers."""
