"""Plain variables of the environment, which the SDKs of OpenAI and Anthropic read."""

from __future__ import annotations

from k2cli.connect.endpoint import Endpoint
from k2cli.connect.settings import Agent, Settings, authority_environment, key_value


def settings(endpoint: Endpoint) -> Settings:
    """Return the variables for programs that use an SDK of OpenAI or Anthropic."""
    return Settings(
        environment={
            "OPENAI_BASE_URL": endpoint.base_url,
            # The name before version 1 of OpenAI's SDK, and LiteLLM's.
            "OPENAI_API_BASE": endpoint.base_url,
            "OPENAI_API_KEY": key_value(endpoint),
            "OPENAI_MODEL": endpoint.model,
            "ANTHROPIC_BASE_URL": endpoint.url,
            "ANTHROPIC_AUTH_TOKEN": key_value(endpoint),
            "ANTHROPIC_MODEL": endpoint.model,
            **authority_environment(endpoint, "SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS"),
        },
        # Anthropic's SDK would send it beside the other.
        unset=("ANTHROPIC_API_KEY",),
    )


AGENT = Agent("env", "environment variables", "", "", settings, "environment")
