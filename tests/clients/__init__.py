"""The SDKs of OpenAI and Anthropic against a run whose rank is scripted."""
